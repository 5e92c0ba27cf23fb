"""The jitted forward: every thread of the crew runs `run_tasks` on the same Job and claims tasks from it.

Letters: T tokens, P routed pairs sorted by expert, A active experts, E experts, D model dim, F expert hidden
dim. Two passes, each a list of tasks claimed by an atomic counter:
    1. (expert, rows of F): h_PF = activation of gate and up      2. rows of D, all experts: y_TD = sum of
    weighted down
so an expert's weights are read once per forward however many tokens it has, and every y has one writer.
A thread that comes late finds nothing to claim and leaves; nobody waits for a thread that has not claimed.
Nothing is allocated and nothing raises in here, so a claimed task is always finished.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from hostcompute.backends.numba_atoms import as_pointer, fetch_add, load_acquire, widen, yield_cpu
from hostcompute.spec import ActivationKind

# Reassociation lets dot products be vectorised. NaN and infinity keep their meaning: nnan and ninf are left
# out.
jit = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})

NUM_COUNTERS = 4 * 8  # four counters, each alone on its cache line
_NEXT_HIDDEN, _DONE_HIDDEN, _NEXT_OUT, _DONE_OUT = 0, 8, 16, 24

KIND_CODES = {kind: code for code, kind in enumerate(ActivationKind)}
_SILU, _RELU = KIND_CODES[ActivationKind.SILU], KIND_CODES[ActivationKind.RELU]
_GELU_TANH, _GELU_ERF = KIND_CODES[ActivationKind.GELU_TANH], KIND_CODES[ActivationKind.GELU_ERF]
_SWIGLU_CLAMP, _SWIGLU_ALPHA = (
    KIND_CODES[ActivationKind.SWIGLU_CLAMP],
    KIND_CODES[ActivationKind.SWIGLU_ALPHA],
)
_SWIGLU_POST_CLAMP = KIND_CODES[ActivationKind.SWIGLU_POST_CLAMP]
_SWIGLU_SOFTCAP = KIND_CODES[ActivationKind.SWIGLU_SOFTCAP]


class Matrices(NamedTuple):
    """One matrix of every expert, where it lies: rows of unit stride, `stride_E` elements apart."""

    address_E: npt.NDArray[np.uint64]
    stride_E: npt.NDArray[np.int64]
    bias_EN: npt.NDArray[np.float32]  # [0, 0] in a bank without biases


class Job(NamedTuple):
    """One forward. `stored` is an empty array whose element type is that of the weights (see `widen`)."""

    counters: npt.NDArray[np.int64]
    stored: npt.NDArray[Any]
    gate: Matrices  # the same as `up` when ungated
    up: Matrices
    down: Matrices
    x_TD: npt.NDArray[np.float32]
    h_PF: npt.NDArray[np.float32]
    y_TD: npt.NDArray[np.float32]
    token_P: npt.NDArray[np.int64]
    pair_P: npt.NDArray[np.int64]  # 0 .. P: the row of h_PF that belongs to each pair
    weight_P: npt.NDArray[np.float32]
    expert_A: npt.NDArray[np.int64]
    first_pair_A1: npt.NDArray[np.int64]  # pairs of active expert a: first_pair_A1[a] .. first_pair_A1[a + 1]
    gated: bool
    kind: int
    limit: np.float32
    alpha: np.float32
    hidden_rows: int  # rows of F per task
    out_rows: int  # rows of D per task


@jit
def run_tasks(job: Any) -> None:
    """Claim tasks until the forward is done. Returns when y_TD is complete or nothing is left to claim."""
    F, D = job.h_PF.shape[1], job.y_TD.shape[1]
    blocks = (F + job.hidden_rows - 1) // job.hidden_rows
    hidden_tasks = blocks * job.expert_A.shape[0]
    out_tasks = (D + job.out_rows - 1) // job.out_rows
    task = fetch_add(job.counters, _NEXT_HIDDEN, 1)
    while task < hidden_tasks:
        begin = (task % blocks) * job.hidden_rows
        _hidden_rows(job, task // blocks, begin, min(begin + job.hidden_rows, F))
        fetch_add(job.counters, _DONE_HIDDEN, 1)
        task = fetch_add(job.counters, _NEXT_HIDDEN, 1)
    _wait_for(job.counters, _DONE_HIDDEN, hidden_tasks)
    task = fetch_add(job.counters, _NEXT_OUT, 1)
    while task < out_tasks:
        begin = task * job.out_rows
        _out_rows(job, begin, min(begin + job.out_rows, D))
        fetch_add(job.counters, _DONE_OUT, 1)
        task = fetch_add(job.counters, _NEXT_OUT, 1)
    _wait_for(job.counters, _DONE_OUT, out_tasks)


@jit
def _wait_for(counters: Any, index: Any, target: Any) -> None:
    while load_acquire(counters, index) < target:
        yield_cpu()


# Below, matrices are passed as addresses and constants one by one: a Job has some two hundred fields by value, and
# handing it to a function per row costs more than a short row itself.
@jit
def _hidden_rows(job: Any, a: Any, begin: Any, end: Any) -> None:
    """h_PF[pairs of active expert a, begin:end]. Tokens outside: 4 of them stay in L1 and the rows in L2."""
    expert, D = job.expert_A[a], job.x_TD.shape[1]
    last = job.first_pair_A1[a + 1]
    gated, kind, limit, alpha = job.gated, job.kind, job.limit, job.alpha
    x_TD, h_PF, token_P, stored = job.x_TD, job.h_PF, job.token_P, job.stored
    first_bias_EF = job.gate.bias_EN if gated else job.up.bias_EN
    up_bias_EF = job.up.bias_EN
    first_address = job.gate.address_E[expert] if gated else job.up.address_E[expert]
    first_stride = job.gate.stride_E[expert] if gated else job.up.stride_E[expert]
    up_address, up_stride = job.up.address_E[expert], job.up.stride_E[expert]
    step = 1 if gated else 2
    for p in range(job.first_pair_A1[a], last, 4):
        for f in range(begin, end, step):
            f2 = f if gated else min(f + 1, end - 1)
            first_D = _row(first_address, first_stride, stored, f, D)
            second_D = _row(up_address, up_stride, stored, f2, D)
            dots = _dots(first_D, second_D, x_TD, token_P, p, last)
            first_bias, second_bias = _bias(first_bias_EF, expert, f), _bias(up_bias_EF, expert, f2)
            for i in range(min(4, last - p)):
                g, u = dots[i] + first_bias, dots[4 + i] + second_bias
                if gated:
                    h_PF[p + i, f] = _activate(kind, limit, alpha, g, u)
                else:
                    h_PF[p + i, f] = _activate(kind, limit, alpha, g, np.float32(1))
                    h_PF[p + i, f2] = _activate(kind, limit, alpha, u, np.float32(1))


@jit
def _out_rows(job: Any, begin: Any, end: Any) -> None:
    """y_TD[:, begin:end], the only writer of it; experts in ascending order, so the sum is reproducible."""
    h_PF, y_TD, stored, bias_ED = job.h_PF, job.y_TD, job.stored, job.down.bias_EN
    token_P, weight_P, pair_P = job.token_P, job.weight_P, job.pair_P
    F = h_PF.shape[1]
    y_TD[:, begin:end] = 0
    for a in range(job.expert_A.shape[0]):
        expert, last = job.expert_A[a], job.first_pair_A1[a + 1]
        address, stride = job.down.address_E[expert], job.down.stride_E[expert]
        for p in range(job.first_pair_A1[a], last, 4):
            for d in range(begin, end, 2):
                d2 = min(d + 1, end - 1)
                first_F, second_F = _row(address, stride, stored, d, F), _row(address, stride, stored, d2, F)
                dots = _dots(first_F, second_F, h_PF, pair_P, p, last)
                first_bias, second_bias = _bias(bias_ED, expert, d), _bias(bias_ED, expert, d2)
                for i in range(min(4, last - p)):
                    token, weight = token_P[p + i], weight_P[p + i]
                    y_TD[token, d] += weight * (dots[i] + first_bias)
                    if d2 != d:
                        y_TD[token, d2] += weight * (dots[4 + i] + second_bias)


@jit
def _row(address: Any, stride: Any, stored: Any, row: Any, size: Any) -> Any:
    return numba.carray(
        as_pointer(address + np.uint64(row * stride * stored.itemsize)), (size,), stored.dtype
    )


@jit
def _bias(bias_EN: Any, expert: Any, row: Any) -> Any:
    return bias_EN[expert, row] if bias_EN.size else np.float32(0)


@jit
def _dots(first_N: Any, second_N: Any, x_RN: Any, row_P: Any, p: Any, last: Any) -> Any:
    """Two weight rows times the x rows of pairs p .. min(p + 4, last): (first . x) x 4, (second . x) x 4."""
    zero = np.float32(0)
    if last - p == 1:
        a0, b0 = _dots_2x1(first_N, second_N, x_RN[row_P[p]])
        return a0, zero, zero, zero, b0, zero, zero, zero
    x0, x1 = x_RN[row_P[p]], x_RN[row_P[p + 1]]
    x2, x3 = x_RN[row_P[min(p + 2, last - 1)]], x_RN[row_P[min(p + 3, last - 1)]]
    return _dots_2x4(first_N, second_N, x0, x1, x2, x3)


@jit
def _dots_2x1(first_N: Any, second_N: Any, x_N: Any) -> Any:
    a, b = np.float32(0), np.float32(0)
    for n in range(x_N.shape[0]):
        a += widen(first_N[n]) * x_N[n]
        b += widen(second_N[n]) * x_N[n]
    return a, b


@jit
def _dots_2x4(first_N: Any, second_N: Any, x0_N: Any, x1_N: Any, x2_N: Any, x3_N: Any) -> Any:
    a0, a1, a2, a3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    b0, b1, b2, b3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for n in range(x0_N.shape[0]):
        first, second = widen(first_N[n]), widen(second_N[n])
        a0 += first * x0_N[n]
        a1 += first * x1_N[n]
        a2 += first * x2_N[n]
        a3 += first * x3_N[n]
        b0 += second * x0_N[n]
        b1 += second * x1_N[n]
        b2 += second * x2_N[n]
        b3 += second * x3_N[n]
    return a0, a1, a2, a3, b0, b1, b2, b3


@jit
def _activate(kind: Any, limit: Any, alpha: Any, g: Any, u: Any) -> Any:
    """See ActivationKind for the formulas; an ungated expert passes u = 1."""
    one, half = np.float32(1), np.float32(0.5)
    if kind in (_SWIGLU_CLAMP, _SWIGLU_ALPHA):
        g, u = min(g, limit), max(min(u, limit), -limit)
    if kind == _SWIGLU_ALPHA:
        return g / (one + np.exp(-alpha * g)) * (u + one)
    if kind == _SWIGLU_POST_CLAMP:
        return min(g / (one + np.exp(-g)), limit) * max(min(u, limit), -limit)
    if kind == _SWIGLU_SOFTCAP:
        capped_g, capped_u = alpha * np.tanh(g / alpha), limit * np.tanh(u / limit)
        return capped_g / (one + np.exp(-g)) * capped_u
    if kind in (_SILU, _SWIGLU_CLAMP):
        return g / (one + np.exp(-g)) * u
    if kind == _GELU_TANH:
        inner = np.float32(math.sqrt(2 / math.pi)) * (g + np.float32(0.044715) * g * g * g)
        return half * g * (one + np.tanh(inner)) * u
    if kind == _GELU_ERF:
        return half * g * np.float32(math.erfc(-g * np.float32(math.sqrt(0.5)))) * u
    positive = max(g, np.float32(0))
    return positive * u if kind == _RELU else positive * positive * u
