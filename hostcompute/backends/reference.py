"""The oracle: NumPy float64, one expert at a time, written to be read."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hostcompute.arrays import HostArray, as_host_array, bf16_bits
from hostcompute.backends.base import ExpertWeights, stored_weights
from hostcompute.backends.checks import check_finite, check_present
from hostcompute.spec import Activation, ActivationKind, ExpertSpec, RoutedCounts

F64 = npt.NDArray[np.float64]


def activate(activation: Activation, gate: F64, up: F64 | None) -> F64:
    """act(g) * u, or act(g) when there is no `up` (ungated); see ActivationKind for the formulas."""
    kind, g, u = activation.kind, gate, up
    if kind in (ActivationKind.SWIGLU_CLAMP, ActivationKind.SWIGLU_ALPHA):
        assert u is not None
        g, u = np.minimum(g, activation.limit), np.clip(u, -activation.limit, activation.limit)
    with np.errstate(over="ignore"):
        if kind is ActivationKind.SWIGLU_ALPHA:
            assert u is not None
            return np.asarray(g / (1 + np.exp(-activation.alpha * g)) * (u + 1))
        if kind is ActivationKind.SWIGLU_POST_CLAMP:
            assert u is not None
            h = np.minimum(g / (1 + np.exp(-g)), activation.limit)
            u = np.clip(u, -activation.limit, activation.limit)
        elif kind is ActivationKind.SWIGLU_SOFTCAP:
            assert u is not None
            h, u = _softcap(g, activation.alpha) / (1 + np.exp(-g)), _softcap(u, activation.limit)
        elif kind in (ActivationKind.SILU, ActivationKind.SWIGLU_CLAMP):
            h = g / (1 + np.exp(-g))
        elif kind is ActivationKind.GELU_TANH:
            h = 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        elif kind is ActivationKind.GELU_ERF:
            h = 0.5 * g * (1 + np.vectorize(math.erf, otypes=[np.float64])(g / math.sqrt(2)))
        elif kind is ActivationKind.RELU:
            h = np.maximum(g, 0)
        else:
            h = np.maximum(g, 0) ** 2
    return np.asarray(h if u is None else h * u)


def _softcap(x: F64, cap: float) -> F64:
    return np.asarray(cap * np.tanh(x / cap))


def expert_ffn(spec: ExpertSpec, weights: dict[str, F64], x_TD: F64) -> F64:
    """One expert on every row of x_TD."""
    up_TF = x_TD @ weights["up"].T + weights.get("up_bias", 0)
    if spec.gated:
        h_TF = activate(spec.activation, x_TD @ weights["gate"].T + weights.get("gate_bias", 0), up_TF)
    else:
        h_TF = activate(spec.activation, up_TF, None)
    return np.asarray(h_TF @ weights["down"].T + weights.get("down_bias", 0))


@dataclass(frozen=True)
class Finished:
    """A Pending that was computed on the spot."""

    counts: RoutedCounts
    busy_s: float

    def wait(self) -> RoutedCounts:
        return self.counts

    def done(self) -> bool:
        return True

    def wait_for(self, seconds_s: float) -> bool:
        return True


class ReferenceBackend:
    """Keeps each expert as float64 matrices."""

    name = "reference"
    isa = "numpy-float64"

    def __init__(self, spec: ExpertSpec) -> None:
        self.spec = spec
        self._experts: dict[int, dict[str, F64]] = {}

    def load(self, expert_id: int, weights: ExpertWeights) -> None:
        stored = stored_weights(self.spec, weights)
        check_finite(expert_id, stored)
        self._experts[expert_id] = {
            name: array.float32().astype(np.float64)
            for name, array in vars(stored).items()
            if array is not None
        }

    def export(self, expert_id: int) -> ExpertWeights:
        arrays: dict[str, Any] = {
            name: as_host_array(m, name, ("float64",)) for name, m in self._experts[expert_id].items()
        }
        return stored_weights(self.spec, ExpertWeights(**arrays))

    def release(self, expert_id: int) -> None:
        self._experts.pop(expert_id, None)

    def forward(
        self, x: HostArray, topk_ids: HostArray, topk_weights: HostArray, out: HostArray
    ) -> RoutedCounts:
        x_TD = x.float32().astype(np.float64)
        ids_TK, weights_TK = topk_ids.numpy(), topk_weights.float32()
        wanted_TK = (ids_TK >= 0) & (ids_TK < self.spec.num_experts) & (weights_TK != 0)
        y_TD = np.zeros_like(x_TD)
        experts = np.unique(ids_TK[wanted_TK])
        check_present(experts, self._experts)
        for expert_id in experts.tolist():
            tokens, slots = np.nonzero(wanted_TK & (ids_TK == expert_id))
            y = expert_ffn(self.spec, self._experts[expert_id], x_TD[tokens])
            np.add.at(y_TD, tokens, y * weights_TK[tokens, slots, None])
        store(out, y_TD)
        return RoutedCounts(int(wanted_TK.sum()), len(experts), len(experts) * self.spec.expert_bytes)

    def submit(self, x: HostArray, topk_ids: HostArray, topk_weights: HostArray, out: HostArray) -> Finished:
        start_s = time.perf_counter()
        counts = self.forward(x, topk_ids, topk_weights, out)
        return Finished(counts, time.perf_counter() - start_s)

    @property
    def resident_bytes(self) -> int:
        return sum(m.nbytes for expert in self._experts.values() for m in expert.values())

    def close(self) -> None:
        self._experts.clear()


def store(out: HostArray, values: npt.NDArray[Any]) -> None:
    """Write float values into `out`, rounded to its element type."""
    out.numpy()[...] = bf16_bits(values.astype(np.float32)) if out.dtype == "bf16" else values
