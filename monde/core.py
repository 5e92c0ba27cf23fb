"""The records that flow through a mixture-of-experts layer, and the letter legend.

Letters, used as suffixes of tensors and arrays everywhere:
    L layers, T tokens, E experts of a layer, K experts per token, D model dim, F expert hidden dim,
    R routed pairs (a token and one of its experts), S slots for resident experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NOT_MINE = -1  # the expert id of a pair that nobody computes; every executor ignores it


@dataclass(frozen=True)
class RoutedBatch:
    """Tokens and where the model's own router sends them.

    x_TD is bf16, fp16 or fp32; topk_ids_TK int64; topk_weights_TK any float type; all on one device.
    Pairs with weight 0 or an id outside [0, E) contribute nothing.
    """

    x_TD: Tensor
    topk_ids_TK: Tensor
    topk_weights_TK: Tensor


@dataclass(frozen=True)
class Placement:
    """Which experts of one layer have a slot on the device: slot_of_expert_E[e], or -1 for the host."""

    slot_of_expert_E: tuple[int, ...]

    @cached_property
    def slot_E(self) -> NDArray[np.int64]:
        """slot_of_expert_E as an array, read only."""
        slot_E = np.array(self.slot_of_expert_E, np.int64)
        slot_E.setflags(write=False)
        return slot_E

    @property
    def resident_experts(self) -> tuple[int, ...]:
        return tuple(e for e, slot in enumerate(self.slot_of_expert_E) if slot >= 0)

    @property
    def num_resident(self) -> int:
        return len(self.resident_experts)


class Pending(Protocol):
    """Part of a layer's result under way."""

    def wait(self) -> Tensor:
        """y_TD of the pairs submitted, zero where a token had none; ready for the device's current stream."""
        ...


class Executor(Protocol):
    """Computes routed pairs somewhere. Executors decide nothing."""

    def submit(self, batch: RoutedBatch, out_dtype: torch.dtype) -> Pending:
        """Start on `batch`; the result is rounded once, to `out_dtype`."""
        ...


@dataclass(frozen=True)
class Counters:
    """What a model did since `Engine.reset_counters`; sums over its layers."""

    num_steps: int  # forward passes of the model
    num_pairs: int
    num_resident_pairs: int  # of these, computed on the device from a slot
    num_fetched_pairs: int  # and from experts that came over the bus for them
    host_weight_bytes: int  # expert weights read from host memory
    h2d_bytes: int
    d2h_bytes: int  # with those of experts whose only copy was in a slot that another one took
    host_busy_s: float  # time the host spent computing experts
    num_swaps: int  # experts that took another's slot
    swap_bytes: int  # what they copied to the device, besides h2d_bytes

    @property
    def hit_rate(self) -> float:
        """Share of the pairs whose expert had a slot; 0 before the first."""
        return self.num_resident_pairs / self.num_pairs if self.num_pairs else 0.0


@dataclass(frozen=True)
class LoadReport:
    """How loading went.

    peak_host_bytes is the growth of resident host memory over its value at the start, at its worst; after
    from_pretrained at least what the model holds, though some of it is read from the checkpoint at the first step.
    Over ranks, of this rank: num_experts counts the experts, or slices of them, that it holds.
    num_released_experts are residents that move without a copy on the host, which saves saved_host_bytes.
    """

    seconds_s: float
    peak_host_bytes: int
    dense_bytes: int
    expert_bytes: int
    num_moe_layers: int
    num_experts: int
    num_resident_experts: int
    num_released_experts: int
    saved_host_bytes: int
