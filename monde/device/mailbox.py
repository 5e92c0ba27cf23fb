"""What the layers of one model share while they decode: the mailbox, and scratch on the device.

The mailbox is pinned host memory that the GPU addresses directly; hostcompute.doorbell answers what arrives in it.
Letters: T tokens, K experts per token, R = T * K routed pairs, D model dim, F expert hidden dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hostcompute import ExpertSpec, make_layout
from hostcompute.layout import LANES
from monde.device.kernels import STATE_WORDS

_LINE_BYTES = 128
_WORDS = ("answered", "failed", "gpu_ns")  # 64 bits each, every one on a line of its own


@dataclass(frozen=True)
class DecodeSize:
    """The largest step that the shared memory must hold, over all layers."""

    max_tokens: int
    max_topk: int
    d_model: int
    d_pad_k: int
    f_pad_k: int
    d_panels: int

    @classmethod
    def of(cls, specs: Sequence[ExpertSpec], max_tokens: int, max_topk: int) -> DecodeSize:
        layouts = [make_layout(spec) for spec in specs]
        return cls(
            max_tokens,
            max_topk,
            max(spec.d_model for spec in specs),
            max(layout.d_pad_k for layout in layouts),
            max(layout.f_pad_k for layout in layouts),
            max(layout.num_d_panels for layout in layouts),
        )

    @property
    def max_pairs(self) -> int:
        return self.max_tokens * self.max_topk

    @property
    def scratch_bytes(self) -> int:
        """Device memory of DecodeScratch, at most."""
        values = self.max_tokens * self.d_pad_k + self.max_pairs * (self.f_pad_k + self.d_panels * LANES + 5)
        return 4 * values + 4096


class DecodeScratch:
    """Device memory that every layer writes and reads in turn on one stream."""

    def __init__(self, size: DecodeSize, device: torch.device, deadline_s: float) -> None:
        def ints(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        num_pairs = size.max_pairs
        self.state = torch.zeros(len(STATE_WORDS), dtype=torch.int64, device=device)
        self.state[STATE_WORDS.index("DEADLINE_NS")] = int(deadline_s * 1e9)
        self.x_TD = torch.zeros(size.max_tokens * size.d_pad_k, device=device)
        self.h_RF = torch.zeros(num_pairs * size.f_pad_k, device=device)
        self.v_RD = torch.zeros(num_pairs * size.d_panels * LANES, device=device)
        self.slots_R, self.is_later_R = ints(num_pairs), ints(num_pairs)
        self.group_slot_G, self.group_pairs_R = ints(num_pairs), ints(num_pairs)
        self.group_first_G, self.num_groups = ints(num_pairs + 1), ints(1)

    @property
    def addresses(self) -> dict[str, int]:
        """By the names of the layer record."""
        return {name: tensor.data_ptr() for name, tensor in vars(self).items()}


class Mailbox:
    """Pinned memory with the words and arrays of hostcompute.doorbell.MailboxAddresses, which `addresses` names."""

    def __init__(self, size: DecodeSize) -> None:
        import cupy

        box = {
            "rung": 8,
            "cut": 8,
            "x": 4 * size.max_tokens * size.d_model,
            "ids": 2 * 4 * size.max_pairs,
            "weights": 4 * size.max_pairs,
            "out": 2 * 4 * size.max_tokens * size.d_model,
        }
        offsets, end = _laid_out(dict.fromkeys(_WORDS, 8) | box)
        _, box_bytes = _laid_out(box)
        end += box_bytes  # the second box
        # Not from a pool: the memory must start as zeros and stay at its address.
        self.memory = cupy.cuda.PinnedMemory(end)
        self.num_bytes = end
        self.addresses = {name: self.memory.ptr + offset for name, offset in offsets.items()}
        self.addresses["box_bytes"] = box_bytes
        self._bytes = _view(self.memory.ptr, end)
        self._bytes.zero_()
        self._offsets = offsets

    @property
    def failed_layer(self) -> int | None:
        """The layer whose answer the GPU gave up waiting for. Reads memory, synchronises with nothing."""
        word = int(self._word("failed").item())
        return word - 1 if word else None

    @property
    def gpu_s(self) -> float:
        """What the GPU's own part of all layers took so far that the host had a part of."""
        return int(self._word("gpu_ns").item()) * 1e-9

    def clear_failure(self) -> None:
        self._word("failed").zero_()

    def _word(self, name: str) -> Tensor:
        return self._bytes[self._offsets[name] :][:8].view(torch.int64)


def _laid_out(parts: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offset of each part of so many bytes, on lines of its own, and where the last one ends."""
    offsets, end = {}, 0
    for name, num_bytes in parts.items():
        offsets[name] = end
        end += -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
    return offsets, end


def _view(address: int, num_bytes: int) -> Tensor:
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=torch.uint8)
