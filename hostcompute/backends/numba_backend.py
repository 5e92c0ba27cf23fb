"""The portable fast backend: numba kernels over row-major weights, used where they lie.

`load` keeps a reference when the matrices are in the bank's type with rows of unit stride (slices of a
memory-mapped checkpoint are), so loading costs no memory and no copy, and the arrays must not change
afterwards.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hostcompute.arrays import HostArray, as_host_array
from hostcompute.backends.base import ExpertWeights, stored_weights
from hostcompute.backends.checks import check_finite, check_present
from hostcompute.backends.crew import shared_crew
from hostcompute.backends.numba_kernels import KIND_CODES, NUM_COUNTERS, Job, Matrices, run_tasks
from hostcompute.backends.reference import store
from hostcompute.spec import ExpertSpec, RoutedCounts
from hostcompute.topology import default_cores

# A task reads about this much: long enough for the hardware prefetcher, short enough to stay in L2 for the
# next tokens.
_TASK_BYTES = 64 << 10

# How the kernels see the stored type; see numba_atoms.widen.
_STORED: dict[str, npt.NDArray[Any]] = {
    "f32": np.empty(0, np.float32),
    "bf16": np.empty(0, np.uint16),
    "f16": np.empty(0, np.int16),
}


@dataclass(frozen=True)
class _Routing:
    """The wanted pairs sorted by expert. P pairs, A active experts."""

    token_P: npt.NDArray[np.int64]
    weight_P: npt.NDArray[np.float32]
    expert_A: npt.NDArray[np.int64]
    first_pair_A1: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Submitted:
    """The Pending of a forward on the submit thread."""

    future: Future[tuple[RoutedCounts, float]]

    def wait(self) -> RoutedCounts:
        return self.future.result()[0]

    def done(self) -> bool:
        return self.future.done()

    def wait_for(self, seconds_s: float) -> bool:
        return bool(wait([self.future], seconds_s).done)

    @property
    def busy_s(self) -> float:
        failed = not self.future.done() or self.future.exception() is not None
        return 0.0 if failed else self.future.result()[1]


class NumbaBackend:
    """One layer's experts as references to row-major matrices; see Backend for the contract."""

    name = "numba"
    isa = "llvm-host"

    def __init__(self, spec: ExpertSpec, num_threads: int | None = None) -> None:
        self.spec = spec
        self._crew = shared_crew(num_threads or len(default_cores()))
        self._experts: dict[int, ExpertWeights] = {}
        self._up, self._down = _no_matrices(spec, spec.d_ffn), _no_matrices(spec, spec.d_model)
        self._gate = _no_matrices(spec, spec.d_ffn) if spec.gated else self._up

    def load(self, expert_id: int, weights: ExpertWeights) -> None:
        stored = stored_weights(self.spec, weights)
        check_finite(expert_id, stored)
        self._experts[expert_id] = stored
        _point_to(self._up, expert_id, stored.up, stored.up_bias)
        _point_to(self._down, expert_id, stored.down, stored.down_bias)
        if stored.gate is not None:
            _point_to(self._gate, expert_id, stored.gate, stored.gate_bias)

    def export(self, expert_id: int) -> ExpertWeights:
        copies: dict[str, Any] = {
            name: _copy(array) for name, array in vars(self._experts[expert_id]).items() if array is not None
        }
        return ExpertWeights(**copies)

    def release(self, expert_id: int) -> None:
        self._experts.pop(expert_id, None)

    def forward(
        self, x: HostArray, topk_ids: HostArray, topk_weights: HostArray, out: HostArray
    ) -> RoutedCounts:
        return self._compute(x, self._route(topk_ids, topk_weights), out)

    def submit(
        self, x: HostArray, topk_ids: HostArray, topk_weights: HostArray, out: HostArray
    ) -> _Submitted:
        routing = self._route(topk_ids, topk_weights)

        def timed() -> tuple[RoutedCounts, float]:
            start_s = time.perf_counter()
            counts = self._compute(x, routing, out)
            return counts, time.perf_counter() - start_s

        return _Submitted(self._crew.submit(timed))

    @property
    def resident_bytes(self) -> int:
        return len(self._experts) * self.spec.expert_bytes + sum(
            m.bias_EN.nbytes for m in (self._up, self._down)
        )

    def close(self) -> None:
        self._experts.clear()

    def _route(self, topk_ids: HostArray, topk_weights: HostArray) -> _Routing:
        ids_TK, weights_TK = topk_ids.numpy(), topk_weights.float32()
        wanted_TK = (ids_TK >= 0) & (ids_TK < self.spec.num_experts) & (weights_TK != 0)
        token_P, slot_P = np.nonzero(wanted_TK)
        expert_P = ids_TK[token_P, slot_P]
        order = np.argsort(expert_P, kind="stable")
        expert_A, first_A = np.unique(expert_P[order], return_index=True)
        check_present(expert_A, self._experts)
        token_P, slot_P = token_P[order], slot_P[order]
        first_pair_A1 = np.append(first_A, len(order)).astype(np.int64)
        return _Routing(token_P, weights_TK[token_P, slot_P], expert_A.astype(np.int64), first_pair_A1)

    def _compute(self, x: HostArray, routing: _Routing, out: HostArray) -> RoutedCounts:
        spec, num_pairs, num_experts = self.spec, len(routing.token_P), len(routing.expert_A)
        y_TD = np.empty(out.shape, np.float32)
        hidden_rows = self._rows_per_task(spec.d_ffn, (spec.num_matrices - 1) * spec.d_model)
        out_rows = self._rows_per_task(spec.d_model, spec.d_ffn)
        job = Job(
            counters=np.zeros(NUM_COUNTERS, np.int64),
            stored=_STORED[spec.dtype.value],
            gate=self._gate,
            up=self._up,
            down=self._down,
            x_TD=np.ascontiguousarray(x.float32()),
            h_PF=np.empty((num_pairs, spec.d_ffn), np.float32),
            y_TD=y_TD,
            token_P=routing.token_P,
            pair_P=np.arange(num_pairs),
            weight_P=routing.weight_P,
            expert_A=routing.expert_A,
            first_pair_A1=routing.first_pair_A1,
            gated=spec.gated,
            kind=KIND_CODES[spec.activation.kind],
            limit=np.float32(spec.activation.limit),
            alpha=np.float32(spec.activation.alpha),
            hidden_rows=hidden_rows,
            out_rows=out_rows,
        )
        num_tasks = num_experts * -(-spec.d_ffn // hidden_rows)
        self._crew.run(run_tasks, job, min(num_tasks, self._crew.num_threads))
        store(out, y_TD)
        return RoutedCounts(num_pairs, num_experts, num_experts * spec.expert_bytes)

    def _rows_per_task(self, num_rows: int, row_elements: int) -> int:
        """An even number of rows of about _TASK_BYTES, small enough that every thread gets several tasks."""
        fitting = _TASK_BYTES // (row_elements * self.spec.dtype.itemsize_bytes)
        return max(2, min(fitting, num_rows // (4 * self._crew.num_threads)) // 2 * 2)


def _no_matrices(spec: ExpertSpec, num_rows: int) -> Matrices:
    bias_shape = (spec.num_experts, num_rows) if spec.has_bias else (0, 0)
    return Matrices(
        np.zeros(spec.num_experts, np.uint64),
        np.zeros(spec.num_experts, np.int64),
        np.zeros(bias_shape, np.float32),
    )


def _point_to(matrices: Matrices, expert_id: int, matrix: HostArray, bias: HostArray | None) -> None:
    matrices.address_E[expert_id], matrices.stride_E[expert_id] = matrix.address, matrix.strides[0]
    if matrices.bias_EN.size:
        matrices.bias_EN[expert_id] = 0 if bias is None else bias.numpy()


def _copy(array: HostArray) -> HostArray:
    bits = array.numpy().copy(order="C")
    if array.dtype != "bf16":
        return as_host_array(bits, "export")
    return HostArray(bits.ctypes.data, bits.shape, tuple(s // 2 for s in bits.strides), "bf16", bits)
