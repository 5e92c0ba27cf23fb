"""Matrix products of rows that lie expert by expert: one product an expert, or one kernel for all.

Letters: R rows, E experts, I and O the input and output dims.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def by_expert(counts_E: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    begin = 0
    for e, count in enumerate(counts_E):
        if count:
            yield e, slice(begin, begin + count)
        begin += count


def has_kernel(x_RI: Tensor) -> bool:
    """torch's grouped_mm runs on CUDA in bf16; on CPUs it is the loop below with more overhead."""
    return x_RI.is_cuda and x_RI.dtype is torch.bfloat16


def offsets(counts_E: list[int], device: torch.device) -> Tensor:
    return torch.tensor(counts_E, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def linear(x_RI: Tensor, w_EOI: Tensor, counts_E: list[int], bias_EO: Tensor | None = None) -> Tensor:
    """y_RO: row r times its expert's matrix, plus its bias."""
    if has_kernel(x_RI):
        y_RO = F.grouped_mm(x_RI, w_EOI.transpose(1, 2), offs=offsets(counts_E, x_RI.device))
        if bias_EO is not None:
            repeats_E = torch.tensor(counts_E, device=x_RI.device)
            y_RO = y_RO + bias_EO.repeat_interleave(repeats_E, 0, output_size=len(x_RI))
        return y_RO
    y_RO = x_RI.new_empty(len(x_RI), w_EOI.shape[1])
    for e, rows in by_expert(counts_E):
        torch.mm(x_RI[rows], w_EOI[e].t(), out=y_RO[rows])
        if bias_EO is not None:
            y_RO[rows] += bias_EO[e]
    return y_RO


def add_weight_gradient(grad_RO: Tensor, x_RI: Tensor, counts_E: list[int], into_EOI: Tensor) -> None:
    """into[e] += grad_e^T x_e."""
    if has_kernel(x_RI):
        into_EOI += F.grouped_mm(grad_RO.t(), x_RI, offs=offsets(counts_E, x_RI.device))
        return
    for e, rows in by_expert(counts_E):
        into_EOI[e].addmm_(grad_RO[rows].t(), x_RI[rows])


def add_bias_gradient(grad_RO: Tensor, counts_E: list[int], into_EO: Tensor) -> None:
    for e, rows in by_expert(counts_E):
        into_EO[e] += grad_RO[rows].sum(0)
