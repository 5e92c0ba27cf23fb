"""Host buffers through which activations cross to and from the device; pinned where the device is a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Staging:
    """Named buffers shared by all layers of a model. They grow to the largest request and stay."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._buffers: dict[str, Tensor] = {}

    def view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor over buffer `name`; valid until the next call with the same name."""
        num_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            # Powers of two, so that growing prompts do not allocate pinned memory at every step.
            size_bytes = 1 << max(12, (num_bytes - 1).bit_length())
            with torch.inference_mode(False):  # steps in any mode write to it
                buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._pinned)
            self._buffers[name] = buffer
        return buffer[:num_bytes].view(dtype).view(shape)

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())
