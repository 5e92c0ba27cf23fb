"""Expert parallelism with padded capacities, laid out as DeepSpeed-MoE lays it out: a baseline, reimplemented.

Every rank sends every expert a buffer of C rows, filled or not, in two equal all-to-alls; every row of every buffer is
computed; what does not fit is dropped. Rows are placed by index (DeepSpeed with Tutel's sparse dispatch, not with its
one-hot [T, E, C] products, which are slower), and the experts run on the same kernels as every other contender.
W ranks, T tokens of this rank, E experts, e of this rank, C rows of an expert and rank, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from monde.core import RoutedBatch
from monde.executors.ranks import RankGroup
from monde.executors.sharded import Compute


@dataclass(frozen=True)
class Padded:
    """y_TD, zero for dropped tokens, and how many tokens of this rank those are."""

    y_TD: Tensor
    num_dropped: int


class PaddedExperts:
    """`compute` works on the E / W whole experts of this rank, ids from 0. Top-1; E is a multiple of W."""

    def __init__(self, ranks: RankGroup, compute: Compute, num_experts: int) -> None:
        assert num_experts % ranks.size == 0, "equal all-to-alls need as many experts on every rank"
        self.ranks, self.compute, self.num_experts = ranks, compute, num_experts

    def forward(self, batch: RoutedBatch, capacity: int) -> Padded:
        """capacity C is the same on all ranks; weights multiply the rows that come back, as in DeepSpeed."""
        x_TD, ids_T = batch.x_TD, batch.topk_ids_TK[:, 0]
        E, W, C, D = self.num_experts, self.ranks.size, capacity, x_TD.shape[1]
        one_hot_TE = torch.nn.functional.one_hot(ids_T, E)
        place_T = (one_hot_TE.cumsum(0) * one_hot_TE).sum(1) - 1
        fits_T = place_T < C
        row_T = (ids_T * C + place_T)[fits_T]
        sent_RD = x_TD.new_zeros((E * C, D))
        sent_RD[row_T] = x_TD[fits_T]
        # Rank by rank, then expert by expert: C rows each, also after the exchange.
        local_ids_R1 = torch.arange(E // W).repeat_interleave(C).repeat(W)[:, None]
        ones_R1 = torch.ones(local_ids_R1.shape)
        y_RD = self.compute(RoutedBatch(self._swapped(sent_RD), local_ids_R1, ones_R1), x_TD.dtype)
        back_RD = self._swapped(y_RD)
        y_TD = torch.zeros_like(x_TD)
        y_TD[fits_T] = back_RD[row_T] * batch.topk_weights_TK[fits_T].to(x_TD.dtype)
        return Padded(y_TD, len(ids_T) - len(row_T))

    def _swapped(self, rows_RD: Tensor) -> Tensor:
        out_RD = torch.empty_like(rows_RD)
        dist.all_to_all_single(out_RD, rows_RD, group=self.ranks.inward)
        return out_RD
