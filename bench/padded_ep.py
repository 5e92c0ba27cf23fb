"""Expert parallelism with padded capacities, as DeepSpeed-MoE lays it out, in plain torch.distributed: a baseline.

Every rank sends every expert a buffer of C rows, filled or not; experts compute all rows; what does not fit is dropped.
This is not DeepSpeed: tokens are placed by index where DeepSpeed multiplies with a one-hot [T, E, C] mask, so it is the
faster of the two. W ranks, T tokens of this rank, E experts, C rows an expert and rank, D model dim, F hidden dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def capacity(num_tokens: int, num_experts: int, factor: float) -> int:
    """C of top-1: DeepSpeed's ceil(T / E * factor), at least its min_capacity of 4."""
    return max(4, math.ceil(num_tokens / num_experts * factor))


def paper_factor(num_experts: int) -> int:
    """What MoEShard's evaluation gives DeepSpeed so that hardly a token is dropped."""
    return min(num_experts, 50)


class PaddedExperts:
    """Top-1 ReLU experts; this rank has E / W of them, keywords of ExpertBank.load. E is a multiple of W."""

    def __init__(self, mine: Sequence[Mapping[str, Tensor]], num_experts: int, factor: float) -> None:
        self.up_eDF = torch.stack([expert["up"].t() for expert in mine])
        self.down_eFD = torch.stack([expert["down"].t() for expert in mine])
        self.num_experts, self.factor = num_experts, factor
        self.num_dropped = 0

    def forward(self, x_TD: Tensor, ids_T1: Tensor, weights_T1: Tensor) -> Tensor:
        (T, D), E, W = x_TD.shape, self.num_experts, dist.get_world_size()
        C = capacity(T, E, self.factor)
        ids_T = ids_T1[:, 0]
        one_hot_TE = torch.nn.functional.one_hot(ids_T, E)
        place_T = (one_hot_TE.cumsum(0) * one_hot_TE).sum(1) - 1
        fits_T = place_T < C
        self.num_dropped = int((~fits_T).sum())
        row_T = (ids_T * C + place_T)[fits_T]
        out_ECD = x_TD.new_zeros((E * C, D))
        out_ECD[row_T] = x_TD[fits_T]
        in_WeCD = torch.empty_like(out_ECD)
        dist.all_to_all_single(in_WeCD, out_ECD)
        in_eND = in_WeCD.view(W, E // W, C, D).transpose(0, 1).reshape(E // W, W * C, D)
        y_eND = torch.bmm(torch.bmm(in_eND, self.up_eDF).relu_(), self.down_eFD)
        y_WeCD = y_eND.view(E // W, W, C, D).transpose(0, 1).contiguous().view(E * C, D)
        back_ECD = torch.empty_like(y_WeCD)
        dist.all_to_all_single(back_ECD, y_WeCD)
        y_TD = torch.zeros_like(x_TD)
        y_TD[fits_T] = back_ECD[row_T] * weights_T1[fits_T]
        return y_TD
