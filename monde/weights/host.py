"""Experts of hostcompute as torch tensors."""

from __future__ import annotations

from collections.abc import Iterable
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
    """The experts of a native bank in the form that slots have (ExpertSlots): views of the bank's memory.

    place_of_expert_E: int32 on the device, where the bank shares its memory (PlaceTable).
    """

    def __init__(self, bank: ExpertBank, place_of_expert_E: Tensor | None = None) -> None:
        self.bank, self.spec, self.place_of_expert_E = bank, bank.spec, place_of_expert_E
        self._places = bank.place_of_expert_E
        self._layout = make_layout(bank.spec)
        self._backend = cast(Any, bank.backend)  # no other backend has these
        self.address, self.num_bytes = self._backend.memory_range
        num_values = self.num_bytes // bank.spec.dtype.itemsize_bytes
        # One view, sliced: making one from an address takes ten times as long as slicing.
        self._all_B = self._view(self.address, num_values, bank.spec.dtype.value).view(torch.uint8)

    def place_of(self, expert_id: int) -> int:
        """Experts whose places follow one another lie in a row."""
        return self._places[expert_id]

    def blob_B(self, expert_id: int) -> Tensor:
        """uint8 [B]. Valid while the bank is open and the expert where it is."""
        return self.run_B(self._places[expert_id], 1)

    def run(self, first_place: int, num_places: int) -> tuple[int, int]:
        """Address and bytes of blobs in places that follow one another, from blob to blob blob_bytes."""
        stride_bytes = self._layout.blob_bytes
        num_bytes = (num_places - 1) * stride_bytes + self._layout.weight_bytes
        return self.address + first_place * stride_bytes, num_bytes

    def run_B(self, first_place: int, num_places: int) -> Tensor:
        """Those blobs: uint8."""
        address, num_bytes = self.run(first_place, num_places)
        return self._all_B[address - self.address :][:num_bytes]

    def range_of(self, first_place: int, num_places: int) -> tuple[int, int]:
        """Address and bytes of whole pages that hold these places and no other."""
        stride_bytes = self._layout.blob_bytes
        return self.address + first_place * stride_bytes, num_places * stride_bytes

    def biases(self, expert_id: int) -> dict[str, Tensor]:
        """fp32 with the padding of a slot, by role; empty where the spec has none."""
        address = self._backend.native_bank.bias_address
        sizes = bias_sizes(self.spec)
        return {role: self._view(address(expert_id, role), size, "f32") for role, size in sizes.items()}

    def _view(self, address: int, size: int, dtype: str) -> Tensor:
        return _tensor(HostArray(address, (size,), (1,), dtype, self._backend.native_bank))


def runs(places: Iterable[int]) -> list[tuple[int, int]]:
    """(first, count) of every run of places that follow one another."""
    found: list[tuple[int, int]] = []
    for place in sorted(places):
        if found and sum(found[-1]) == place:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((place, 1))
    return found


def _tensor(array: HostArray) -> Tensor:
    tensor = torch.from_numpy(array.numpy())
    return tensor.view(torch.bfloat16) if array.dtype == "bf16" else tensor
