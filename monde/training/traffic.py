"""Who sends which rows where, in how many chunks: index arithmetic from one matrix of counts.

Letters: N nodes, L ranks of a node, E experts, R rows; A = L * N sources of a node's rows.

A rank's rows lie expert by expert. Chunk i of r takes rows c*i//r .. c*(i+1)//r of every expert's c rows: any number of
chunks follows from the counts alone, so forward and backward may differ in theirs without another exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def shard_bounds(size: int, num_shards: int) -> list[int]:
    """Where contiguous shards begin, and the end; as torch.chunk and DTensor cut: [size // num up], the last short."""
    width = -(-size // num_shards)
    return [min(i * width, size) for i in range(num_shards + 1)]


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... start + length - 1 of every pair, one after the other."""
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(shift, lengths) + torch.arange(int(lengths.sum()))


def starts_of(lengths: Tensor) -> Tensor:
    return (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)


@dataclass(frozen=True)
class Chunk:
    """One chunk on this rank. Splits are rows by peer; indices are None where nothing moves.

    rows_index: its rows among the rank's own. to_experts_index brings gathered rows, source by source, to expert by
    expert; from_experts_index back.
    """

    rows_index: Tensor | None
    send_splits_N: list[int]
    recv_splits_N: list[int]
    gather_splits_L: list[int]
    to_experts_index: Tensor
    from_experts_index: Tensor
    expert_counts: list[int]

    @property
    def num_received(self) -> int:
        return sum(self.recv_splits_N)

    @property
    def num_rows(self) -> int:
        """What this rank's experts compute."""
        return sum(self.gather_splits_L)


@dataclass(frozen=True)
class Traffic:
    """counts_NLE: rows that rank (n, l) has for every expert; on the host, the same on all ranks."""

    counts_NLE: Tensor
    node_idx: int
    local_idx: int

    @cached_property
    def bounds(self) -> list[int]:
        """Experts of node n: bounds[n] .. bounds[n + 1]."""
        return shard_bounds(self.counts_NLE.shape[2], self.counts_NLE.shape[0])

    @property
    def busiest_rows(self) -> int:
        """Rows that the busiest node computes: all ranks know it, so all plan alike."""
        load_E = self.counts_NLE.sum((0, 1))
        return max(
            int(load_E[begin:end].sum()) for begin, end in zip(self.bounds, self.bounds[1:], strict=False)
        )

    def _chunk_counts(self, i: int, num_chunks: int) -> Tensor:
        return self.counts_NLE * (i + 1) // num_chunks - self.counts_NLE * i // num_chunks

    @property
    def _mine(self) -> slice:
        return slice(self.bounds[self.node_idx], self.bounds[self.node_idx + 1])

    def chunk(self, i: int, num_chunks: int) -> Chunk:
        counts_NLE = self._chunk_counts(i, num_chunks)
        own_E = self.counts_NLE[self.node_idx, self.local_idx]
        sent_E = counts_NLE[self.node_idx, self.local_idx]
        received_NLE = counts_NLE[:, :, self._mine]
        by_source_AE = received_NLE.transpose(0, 1).flatten(0, 1)
        starts_AE = starts_of(by_source_AE)
        by_expert_EA = by_source_AE.t().contiguous()
        return Chunk(
            rows_index=None
            if num_chunks == 1
            else ranges(starts_of(own_E) + own_E * i // num_chunks, sent_E),
            send_splits_N=[
                int(sent_E[begin:end].sum()) for begin, end in zip(self.bounds, self.bounds[1:], strict=False)
            ],
            recv_splits_N=received_NLE[:, self.local_idx].sum(1).tolist(),
            gather_splits_L=received_NLE.sum((0, 2)).tolist(),
            to_experts_index=ranges(starts_AE.t().flatten(), by_expert_EA.flatten()),
            from_experts_index=ranges(starts_of(by_expert_EA).t().flatten(), by_source_AE.flatten()),
            expert_counts=by_expert_EA.sum(1).tolist(),
        )

    def regroup(self, num_chunks_before: int, num_chunks: int) -> list[Tensor]:
        """For every one of `num_chunks` chunks, where its rows (expert by expert) lie in the concatenation of the
        `num_chunks_before` chunks' rows.
        """
        before = torch.cat([self._canonical(i, num_chunks_before) for i in range(num_chunks_before)])
        place = torch.empty_like(before)
        place[before] = torch.arange(len(before))
        return [place[self._canonical(i, num_chunks)] for i in range(num_chunks)]

    def _canonical(self, i: int, num_chunks: int) -> Tensor:
        """Of the rows of one chunk, as experts get them: positions if there were one chunk."""
        whole_EA = self.counts_NLE[:, :, self._mine].permute(2, 1, 0).flatten(1)
        begin_EA, end_EA = whole_EA * i // num_chunks, whole_EA * (i + 1) // num_chunks
        return ranges((starts_of(whole_EA) + begin_EA).flatten(), (end_EA - begin_EA).flatten())
