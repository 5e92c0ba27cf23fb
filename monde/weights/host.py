"""Arrays of hostcompute as torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from hostcompute.arrays import HostArray
from hostcompute.backends.base import ExpertWeights


def from_host_arrays(weights: ExpertWeights) -> dict[str, Tensor]:
    """The arrays that exist, under the keywords of ExpertBank.load; copies, so `weights` may go."""
    return {role: _tensor(array) for role, array in vars(weights).items() if array is not None}


def _tensor(array: HostArray) -> Tensor:
    tensor = torch.from_numpy(array.numpy().copy())
    return tensor.view(torch.bfloat16) if array.dtype == "bf16" else tensor
