"""Experts cut along F over ranks: each rank computes its slice of every expert for the tokens of all ranks.

    gather unique rows -> compute the slice -> sum at the owners

in chunks, so that while chunk c is computed chunk c + 1 arrives and chunk c - 1 leaves. The load of every rank is its
slice times all pairs, whatever the routing (MoEShard, arXiv 2503.08467). A row is gathered once however many experts it
has, and the sums are of fp32 values. W ranks, T tokens of this rank, N rows of all ranks, D model dim, M routing words.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from monde.core import RoutedBatch
from monde.executors.ranked_batch import RankedBatch, unpack_routing
from monde.executors.ranks import RankGroup
from monde.executors.rows import PendingRows, PendingSum, gather_rows, sum_rows

# compute(batch, out_dtype): the weighted sums of what this rank holds, as MoELayer.compute.
Compute = Callable[[RoutedBatch, torch.dtype], Tensor]


@dataclass(frozen=True)
class Chunk:
    """Part of everybody's tokens: of rank w, those from start_W[w] to end_W[w]."""

    start_W: tuple[int, ...]
    end_W: tuple[int, ...]

    @property
    def counts_W(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in zip(self.start_W, self.end_W, strict=True))


def chunks_of(num_tokens_W: tuple[int, ...], num_chunks: int) -> Iterator[Chunk]:
    """Each rank's tokens in num_chunks parts as equal as can be; chunks in which nobody has any are left out."""
    for c in range(num_chunks):
        chunk = Chunk(
            tuple(num * c // num_chunks for num in num_tokens_W),
            tuple(num * (c + 1) // num_chunks for num in num_tokens_W),
        )
        if any(chunk.counts_W):
            yield chunk


class ShardedExecutor:
    """`compute` works on this rank's slice of the layer's experts."""

    def __init__(self, ranks: RankGroup, compute: Compute) -> None:
        self.ranks, self.compute = ranks, compute

    def forward(self, batch: RankedBatch, num_chunks: int) -> Tensor:
        """y_TD of this rank's tokens, rounded once. All ranks call it, with one num_chunks. Errors: RankError."""
        ranks, x_TD = self.ranks, batch.mine.x_TD
        chunks = list(chunks_of(batch.counts.num_tokens_W, num_chunks))
        arriving = deque(self._gather(batch, chunk) for chunk in chunks[:1])
        words_NM = batch.all_words(ranks)
        leaving: deque[tuple[Chunk, PendingSum]] = deque()
        y_TD = torch.empty_like(x_TD)
        for c, chunk in enumerate(chunks):
            arriving.extend(self._gather(batch, following) for following in chunks[c + 1 : c + 2])
            ids_NK, weights_NK = unpack_routing(_rows_of(words_NM, batch.counts.num_tokens_W, chunk))
            x_ND = arriving.popleft().wait()
            partial_ND = self.compute(RoutedBatch(x_ND, ids_NK, weights_NK), torch.float32)
            leaving.append((chunk, sum_rows(ranks, partial_ND, chunk.counts_W)))
            if len(leaving) > 1:
                self._arrive(y_TD, *leaving.popleft())
        for pending in leaving:
            self._arrive(y_TD, *pending)
        return y_TD

    def _gather(self, batch: RankedBatch, chunk: Chunk) -> PendingRows:
        if batch.x_of_all is not None:
            here_ND = _rows_of(batch.x_of_all, batch.counts.num_tokens_W, chunk)
            return PendingRows(self.ranks, here_ND, works=[])
        return gather_rows(self.ranks, self._own(batch.mine.x_TD, chunk), chunk.counts_W)

    def _own(self, x_TD: Tensor, chunk: Chunk) -> Tensor:
        return x_TD[chunk.start_W[self.ranks.rank] : chunk.end_W[self.ranks.rank]]

    def _arrive(self, y_TD: Tensor, chunk: Chunk, pending: PendingSum) -> None:
        self._own(y_TD, chunk).copy_(pending.wait())


def _rows_of(rows_NM: Tensor, num_tokens_W: tuple[int, ...], chunk: Chunk) -> Tensor:
    """Of rows that lie rank by rank, those of a chunk."""
    firsts = accumulate(num_tokens_W, initial=0)
    bounds = zip(firsts, chunk.start_W, chunk.end_W, strict=False)
    return torch.cat([rows_NM[first + start : first + end] for first, start, end in bounds])
