"""Which experts of one layer the GPU computes and which the host, for one step: exact, in microseconds.

Three lanes run at once: the bus copies, the GPU multiplies, the host multiplies.
    copy = busy + sum over fetched of copy(share)   gemm = residents + fetched           host = trip + the others
    time = max(overlapped(host, lead + copy), overlapped(gemm, lead + copy), launch + gemm)     (`cost.overlapped_s`)
    Experts that the host has begun on are a constant of its lane, and its trip is without what planning holds up.
    lead: what holds the bus up besides, where anything is fetched; launch: Python's before the products, lead included
Residents are on the GPU already. All experts of a layer have the same bytes, so for a given number fetched the bus
does not care which; the host is helped most by losing its slowest. Hence an optimum fetches a prefix of the cold
experts sorted by host seconds, and a cut expert is the next one: scanning prefixes and cuts is exact over all
assignments as long as the GPU's side, its arithmetic beside copies or behind Python's launches, is not what bounds the
step, and exact over prefixes when it is.

Exact over all assignments then, too, would be PARTITION (two equal lanes, one sum to halve), so it is bounded instead.
Let no later expert of the order take longer on the GPU, nor gain more host seconds per GPU second. Of any assignment
without a cut take the longest prefix with no more GPU seconds: its experts are the longest, so they are no more and
copy no more; they gain the most per GPU second, so what the host lacks is less than one expert. `overlapped` grows no
faster than its parts: the best prefix is within one expert's host seconds of the best assignment, within two of one
that cuts. Otherwise nothing is promised.

E experts, F expert hidden dim, t_E tokens of each expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monde.planning.cost import CostModel, Seconds, greatest, overlapped_s


class Where(IntEnum):
    IDLE = -1  # no tokens
    RESIDENT = 0
    FETCHED = 1
    HOST = 2


_NONE = np.zeros(0, np.int64)
_IDLE, _RESIDENT, _FETCHED, _HOST = (np.int8(where) for where in Where)  # enums are slow in array operations


@dataclass(frozen=True)
class Load:
    """One layer in one step. num_tokens rows travel to the host and back if it takes part.

    bus_busy_s: what the bus still copies before it is free for this layer, residents' weights among it. cut_granule: a
    cut expert's rows of F on the GPU are a multiple of it; None forbids cutting. begun_E: what the host computes in any
    case, having begun on it before there was a plan; None: nothing.
    """

    tokens_E: NDArray[np.int64]
    resident_E: NDArray[np.bool_]
    num_tokens: int
    cut_granule: int | None = None
    bus_busy_s: float = 0.0
    begun_E: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.tokens_E.shape != self.resident_E.shape or self.tokens_E.ndim != 1:
            raise ValueError(
                f"Load: expected tokens_E and resident_E of one shape (E,), got {self.tokens_E.shape}, "
                f"{self.resident_E.shape}"
            )
        if self.cut_granule is not None and self.cut_granule < 1:
            raise ValueError(f"Load: expected cut_granule of at least 1 row, got {self.cut_granule}")


@dataclass(frozen=True)
class ExpertSplit:
    """where_E[e] is a Where. The cut expert counts as HOST there; its first cut_rows of F are fetched.

    copy_s, gemm_s, host_s: each lane alone, trip_s of host_s no experts'; lead_s and launch_s: what holds up the bus and
    the products; python_s: when everything is launched and the host has answered; makespan_s: everything together.
    host_memory_share: of host_s, what it reads memory in, see Lanes.
    """

    where_E: NDArray[np.int8]
    cut_expert: int | None
    cut_rows: int
    copy_s: float
    gemm_s: float
    host_s: float
    trip_s: float
    lead_s: float
    launch_s: float
    python_s: float
    makespan_s: float
    host_memory_share: float

    @property
    def num_fetched(self) -> int:
        return int(np.count_nonzero(self.where_E == Where.FETCHED))


class Lanes:
    """The costs of one load, with the n cold experts in the order in which they would be fetched."""

    def __init__(self, load: Load, cost: CostModel) -> None:
        self.load, self.cost, gpu = load, cost, cost.gpu
        host_E = cost.work_s(cost.host, load.tokens_E)
        gemm_E = cost.work_s(gpu.expert, load.tokens_E)
        active_E = load.tokens_E > 0
        is_cold_E = active_E & ~load.resident_E
        self.begun = np.flatnonzero(is_cold_E & load.begun_E) if load.begun_E is not None else _NONE
        if len(self.begun):
            is_cold_E[self.begun] = False
        cold = np.flatnonzero(is_cold_E)
        # Slowest on the host first: ascending by key, last key first.
        self.order = cold[np.lexsort((-load.tokens_E[cold], -host_E[cold]))]
        self.tokens_n = load.tokens_E[self.order]
        self.host_work_n, self.gemm_work_n = host_E[self.order], gemm_E[self.order]
        self.host_n = self.host_work_n + cost.host.overhead_s
        self.gemm_n = self.gemm_work_n + gpu.expert.overhead_s
        resident_s = gemm_E[active_E & load.resident_E]
        self.resident_s = float(resident_s.sum()) + len(resident_s) * gpu.expert.overhead_s
        self.copy_one_s = gpu.h2d.alpha_s + gpu.h2d.s_per_unit * cost.shape.expert_bytes
        self.begun_s = float(host_E[self.begun].sum()) + len(self.begun) * cost.host.overhead_s
        # A host that has begun is not held up by the plan.
        trip_s = cost.round_trip_s if len(self.begun) else cost.prompt_trip_s
        self.trip_s, self.fetch_s = trip_s(load.num_tokens), gpu.prompt.fetch_s
        self.host_memory_share = self._reading_share()
        self._host_while_copying = gpu.host_while_copying.of_share(self.host_memory_share)

    def _reading_share(self) -> float:
        """Of the host's time if it computed all cold experts, what it reads them in: products of many tokens leave the
        memory to the bus. One number a load, whoever is fetched, because the exactness of the split rests on that."""
        num_experts = len(self.order) + len(self.begun)
        reading_s = num_experts * self.cost.shape.expert_bytes / self.cost.host.bytes_per_s
        host_s = self.trip_s + self.begun_s + float(self.host_n.sum())
        return min(1.0, reading_s / host_s) if host_s > 0 else 1.0

    def _answered_s(self, copied_s: float, host_s: float) -> float:
        """When the host is done: slowed for as long as the bus is busy."""
        overlap = self._host_while_copying
        return min(host_s * overlap.first, overlapped_s(host_s, copied_s, overlap))

    def makespan_s(self, lead_s: Any, copy_s: Any, gemm_s: Any, host_s: Any) -> Any:
        """Numbers, or arrays; lead_s may be a number for all."""
        gpu = self.cost.gpu
        copied_s = lead_s + copy_s
        with_host_s = overlapped_s(host_s, copied_s, self._host_while_copying)
        with_gpu_s = overlapped_s(gemm_s, copied_s, gpu.gpu_while_copying)
        launched_s = gpu.prompt.layer_s + lead_s + gemm_s
        return greatest(with_host_s, greatest(with_gpu_s, launched_s))

    def prefixes(self) -> tuple[Seconds, Seconds, Seconds]:
        """copy_s, gemm_s, host_s when the first k are fetched, k = 0 ... n."""
        n = len(self.order)
        host_s = np.full(n + 1, self.trip_s + self.begun_s if len(self.begun) else 0.0)
        host_s[:-1] = self.trip_s + self.begun_s + np.cumsum(self.host_n[::-1])[::-1]
        gemm_s = np.full(n + 1, self.resident_s)
        gemm_s[1:] += np.cumsum(self.gemm_n)
        return self.load.bus_busy_s + np.arange(n + 1) * np.float64(self.copy_one_s), gemm_s, host_s

    def whole_s(self, copy_k: Seconds, gemm_k: Seconds, host_k: Seconds) -> Seconds:
        """makespan_s when the first k are fetched, of what `prefixes` says."""
        lead_k = np.full(len(copy_k), self.fetch_s)
        lead_k[0] = 0.0
        whole_k: Seconds = self.makespan_s(lead_k, copy_k, gemm_k, host_k)
        return whole_k

    def cut(self, idx: NDArray[np.int64], share: Seconds) -> tuple[Seconds, Seconds, Seconds]:
        """What cutting expert idx adds to copy_s and gemm_s and takes from host_s; share in (0, 1)."""
        h2d = self.cost.gpu.h2d
        copy_s = h2d.alpha_s + h2d.s_per_unit * self.cost.shape.expert_bytes * share
        gemm_s = self.cost.gpu.expert.overhead_s + share * self.gemm_work_n[idx]
        return copy_s, gemm_s, share * self.host_work_n[idx]

    def split(self, num_fetched: int, cut_rows: int = 0) -> ExpertSplit:
        """The record for the first `num_fetched` fetched and, where cut_rows > 0, the next one cut."""
        fetched_n = np.arange(len(self.order)) < num_fetched
        return self.split_by(fetched_n, num_fetched if cut_rows else None, cut_rows)

    def split_by(
        self, fetched_n: NDArray[np.bool_], cut_idx: int | None = None, cut_rows: int = 0
    ) -> ExpertSplit:
        """The record for any set; positions are those of `order`."""
        host_n = self.host_n[~fetched_n]
        copy_s = self.load.bus_busy_s + self.copy_one_s * (len(fetched_n) - len(host_n))
        gemm_s = self.resident_s + float(self.gemm_n[fetched_n].sum())
        trip_s = self.trip_s if len(host_n) + len(self.begun) else 0.0
        host_s = float(host_n.sum()) + self.begun_s + trip_s
        if cut_idx is not None:
            added = self.cut(np.asarray(cut_idx), np.asarray(cut_rows / self.cost.shape.d_ffn))
            copy_s, gemm_s, host_s = (
                copy_s + float(added[0]),
                gemm_s + float(added[1]),
                host_s - float(added[2]),
            )
        where_E = np.full(len(self.load.tokens_E), _IDLE)
        where_E[self.load.tokens_E > 0] = _RESIDENT
        where_E[self.order] = np.where(fetched_n, _FETCHED, _HOST)
        where_E[self.begun] = _HOST
        cut_expert = None if cut_idx is None else int(self.order[cut_idx])
        lead_s = self.fetch_s if cut_expert is not None or len(host_n) < len(fetched_n) else 0.0
        launch_s = self.cost.gpu.prompt.layer_s + lead_s
        return ExpertSplit(
            where_E,
            cut_expert,
            cut_rows,
            copy_s,
            gemm_s,
            host_s,
            trip_s,
            lead_s,
            launch_s,
            python_s=max(launch_s, self._answered_s(lead_s + copy_s, host_s)),
            makespan_s=self.makespan_s(lead_s, copy_s, gemm_s, host_s),
            host_memory_share=self.host_memory_share,
        )


def best_uncut(load: Load, cost: CostModel) -> NDArray[np.int64]:
    """The experts that the split of least makespan_s fetches if it may cut none, the slowest on the host first."""
    lanes = Lanes(load, cost)
    return lanes.order[: int(np.argmin(lanes.whole_s(*lanes.prefixes())))]


def best_split(load: Load, cost: CostModel) -> ExpertSplit:
    """The split of least makespan_s; O(E log E) array operations, no loop over experts."""
    lanes = Lanes(load, cost)
    copy_k, gemm_k, host_k = lanes.prefixes()
    whole_k = lanes.whole_s(copy_k, gemm_k, host_k)
    best_k = int(np.argmin(whole_k))
    rows = np.arange(load.cut_granule, cost.shape.d_ffn, load.cut_granule) if load.cut_granule else None
    if rows is None or len(rows) == 0 or len(lanes.order) == 0:
        return lanes.split(best_k)
    # A cut at k copies at least copy_k and leaves the host at least host_k of the next: few k can still win.
    least_k = lanes.makespan_s(lanes.fetch_s, copy_k[:-1], gemm_k[:-1], host_k[1:])
    hopeful = np.flatnonzero(least_k < whole_k[best_k])
    if len(hopeful) == 0:
        return lanes.split(best_k)
    copy_s, gemm_s, saved_s = lanes.cut(hopeful[:, None], rows / cost.shape.d_ffn)
    cut_s = lanes.makespan_s(
        lanes.fetch_s,
        copy_k[hopeful, None] + copy_s,
        gemm_k[hopeful, None] + gemm_s,
        host_k[hopeful, None] - saved_s,
    )
    i, j = np.unravel_index(int(np.argmin(cut_s)), cut_s.shape)
    if cut_s[i, j] >= whole_k[best_k]:
        return lanes.split(best_k)
    return lanes.split(int(hopeful[i]), int(rows[j]))
