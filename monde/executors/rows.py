"""Rows of activations between ranks: gathered, swapped, summed at their owners. Nothing here waits before `wait`.

Rows travel as bytes, whatever their type. Any rank may have no rows. W ranks, N rows, D model dim.
Gloo: its all-gather pads and copies and its reduce-scatter is an all-reduce a rank, so rows are gathered by a broadcast
from every rank straight into place (half the time at 2 ranks, a third at 4) and summed after an all-to-all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from monde.executors.ranks import RankGroup


@dataclass
class PendingRows:
    """Rows under way; `keep` is what the transfer still reads."""

    ranks: RankGroup
    rows: Tensor
    works: list[Any]
    keep: tuple[Tensor, ...] = ()

    def wait(self) -> Tensor:
        """Errors: RankError."""
        for work in self.works:
            if self.ranks.device_type == "cpu":
                self.ranks.finish(work)
            else:  # the current stream waits, not the caller
                self.ranks.guarded(work.wait)
        self.works, self.keep = [], ()
        return self.rows


@dataclass
class PendingSum:
    """Partial sums under way to their owner: parts_WND, or the sum itself where the backend makes it."""

    pending: PendingRows

    def wait(self) -> Tensor:
        """sum_ND, added in the order of the ranks. Errors: RankError."""
        rows = self.pending.wait()
        return rows.sum(dim=0) if rows.dim() == 3 else rows


def gather_rows(ranks: RankGroup, mine_ND: Tensor, counts_W: Sequence[int]) -> PendingRows:
    """All ranks' rows, rank by rank; counts_W says how many each has, everywhere the same."""
    out_ND = mine_ND.new_empty((sum(counts_W), *mine_ND.shape[1:]))
    parts = _parts(out_ND, counts_W)
    if ranks.device_type == "cuda":
        works = [_start(ranks, dist.all_gather, parts, _bytes(mine_ND), group=ranks.inward)]
        return PendingRows(ranks, out_ND, works, (mine_ND,))
    parts[ranks.rank].copy_(_bytes(mine_ND))
    works = [
        _start(ranks, dist.broadcast, part, group=ranks.inward, group_src=source)
        for source, part in enumerate(parts)
        if len(part)
    ]
    return PendingRows(ranks, out_ND, works)


def swap_rows(
    ranks: RankGroup, out_ND: Tensor, to_W: Sequence[int], from_W: Sequence[int], group: Any
) -> PendingRows:
    """out_ND holds to_W[w] rows for each rank w in turn; what the others sent, from_W[w] rows each, comes back."""
    in_ND = out_ND.new_empty((sum(from_W), *out_ND.shape[1:]))
    work = _start(
        ranks, dist.all_to_all_single, _bytes(in_ND), _bytes(out_ND), list(from_W), list(to_W), group=group
    )
    return PendingRows(ranks, in_ND, [work], (out_ND,))


def sum_rows(ranks: RankGroup, partial_ND: Tensor, counts_W: Sequence[int]) -> PendingSum:
    """The inverse of gather_rows: every rank's partial sums of all rows, summed where the rows came from."""
    num_mine = counts_W[ranks.rank]
    if ranks.device_type == "cuda":
        sum_ND = partial_ND.new_empty((num_mine, *partial_ND.shape[1:]))
        parts = list(partial_ND.split(list(counts_W)))
        work = _start(ranks, dist.reduce_scatter, sum_ND, parts, group=ranks.outward)
        return PendingSum(PendingRows(ranks, sum_ND, [work], (partial_ND,)))
    swapped = swap_rows(ranks, partial_ND, counts_W, [num_mine] * ranks.size, ranks.outward)
    swapped.rows = swapped.rows.view(ranks.size, num_mine, *partial_ND.shape[1:])
    return PendingSum(swapped)


def _start(ranks: RankGroup, collective: Any, *args: Any, **kwargs: Any) -> Any:
    return ranks.guarded(lambda: collective(*args, async_op=True, **kwargs))


def _parts(rows: Tensor, counts_W: Sequence[int]) -> list[Tensor]:
    ends = accumulate(counts_W, initial=0)
    return [_bytes(rows[start:end]) for start, end in pairwise(ends)]


def _bytes(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8)
