"""What a backend owes an ExpertBank. One implementation a file; `select.py` chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hostcompute.arrays import HostArray, row_major
from hostcompute.spec import ExpertSpec, RoutedCounts


@dataclass(frozen=True)
class ExpertWeights:
    """One expert, row-major matrices of any strides: gate_FD, up_FD, down_DF and optional biases."""

    up: HostArray
    down: HostArray
    gate: HostArray | None = None
    up_bias: HostArray | None = None
    down_bias: HostArray | None = None
    gate_bias: HostArray | None = None


def stored_weights(spec: ExpertSpec, weights: ExpertWeights) -> ExpertWeights:
    """`weights` as a bank of `spec` stores them: matrices in spec.dtype, biases in f32, rows of unit stride.

    What has that form already is referenced, not copied.
    """
    return ExpertWeights(
        **{
            name: row_major(array, "f32" if name.endswith("_bias") else spec.dtype.value)
            for name, array in vars(weights).items()
            if array is not None
        }
    )


class Pending(Protocol):
    """A forward under way. `wait` raises what the computation raised and may be called again."""

    def wait(self) -> RoutedCounts: ...

    def done(self) -> bool: ...

    def wait_for(self, seconds_s: float) -> bool: ...

    @property
    def busy_s(self) -> float: ...


class Backend(Protocol):
    """Stores one layer's experts and computes routed pairs. Arguments are validated by ExpertBank."""

    name: str
    isa: str

    def load(self, expert_id: int, weights: ExpertWeights) -> None: ...

    def export(self, expert_id: int) -> ExpertWeights: ...

    def release(self, expert_id: int) -> None: ...

    def submit(
        self, x: HostArray, topk_ids: HostArray, topk_weights: HostArray, out: HostArray
    ) -> Pending: ...

    def forward(
        self, x: HostArray, topk_ids: HostArray, topk_weights: HostArray, out: HostArray
    ) -> RoutedCounts: ...

    @property
    def resident_bytes(self) -> int:
        """Host bytes held for weights, padding included."""
        ...

    def close(self) -> None: ...
