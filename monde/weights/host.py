"""Experts of hostcompute as torch tensors."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from hostcompute import ExpertBank, make_layout
from hostcompute.arrays import HostArray
from hostcompute.backends.base import ExpertWeights
from monde.weights.slots import bias_sizes


def from_host_arrays(weights: ExpertWeights) -> dict[str, Tensor]:
    """The arrays that exist, under the keywords of ExpertBank.load; copies, so `weights` may go."""
    return {role: _tensor(array).clone() for role, array in vars(weights).items() if array is not None}


class HostBlobs:
    """The experts of a native bank in the form that slots have (ExpertSlots): views of the bank's memory."""

    def __init__(self, bank: ExpertBank) -> None:
        self.bank, self.spec = bank, bank.spec
        self._layout = make_layout(bank.spec)
        self._backend = cast(Any, bank.backend)  # no other backend has these
        self.address, self.num_bytes = self._backend.memory_range

    def blob_B(self, expert_id: int) -> Tensor:
        """uint8 [B]. Valid while the bank is open."""
        address = self.address + expert_id * self._layout.blob_bytes
        num_values = self._layout.weight_bytes // self.spec.dtype.itemsize_bytes
        return self._view(address, num_values, self.spec.dtype.value).view(torch.uint8)

    def biases(self, expert_id: int) -> dict[str, Tensor]:
        """fp32 with the padding of a slot, by role; empty where the spec has none."""
        address = self._backend.native_bank.bias_address
        sizes = bias_sizes(self.spec)
        return {role: self._view(address(expert_id, role), size, "f32") for role, size in sizes.items()}

    def _view(self, address: int, size: int, dtype: str) -> Tensor:
        return _tensor(HostArray(address, (size,), (1,), dtype, self._backend.native_bank))


def _tensor(array: HostArray) -> Tensor:
    tensor = torch.from_numpy(array.numpy())
    return tensor.view(torch.bfloat16) if array.dtype == "bf16" else tensor
