"""What no runtime on this machine can beat: the bound of a step, and the targets that figures are held to. Pure.

    step >= max(cold bytes / bandwidth of host reads and copies together, resident bytes / HBM bandwidth)
            + the step without experts + a hand-over to the host per layer that has cold pairs
            + resident bytes / HBM bandwidth of layers that have none: layers follow each other, nothing hides those

Letters: L layers, E experts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ceilings:
    """Measured in the run. Overlapped: host reads while copies to the GPU run, and those copies; 0 without a GPU."""

    host_read_bytes_per_s: float
    h2d_bytes_per_s: float
    overlapped_host_bytes_per_s: float
    overlapped_h2d_bytes_per_s: float
    hbm_read_bytes_per_s: float
    round_trip_s: float  # per layer: the hand-over alone
    own_round_trip_s: float = (
        0.0  # a whole layer with next to no work, by the threads that monde's host kernels have
    )

    @property
    def cold_bytes_per_s(self) -> float:
        """How fast cold experts can be read at best, whoever reads them."""
        together = self.overlapped_host_bytes_per_s + self.overlapped_h2d_bytes_per_s
        return max(self.host_read_bytes_per_s, together)


@dataclass(frozen=True)
class Traffic:
    """Distinct experts that a step reads, summed over layers, and the layers that have cold ones.

    residents_alone: of resident_experts, in layers that have no cold ones; 0 where a contender does not tell.
    """

    cold_experts: float
    resident_experts: float
    layers_with_cold: float
    residents_alone: float = 0.0

    def scaled(self, factor: float) -> Traffic:
        return Traffic(*(getattr(self, field.name) * factor for field in dataclasses.fields(self)))


def expected_traffic(p_LE: NDArray[np.float64], resident_LE: NDArray[np.bool_], batch: int) -> Traffic:
    """Of `batch` tokens that choose experts independently with these probabilities."""
    read_LE = 1 - (1 - np.clip(p_LE, 0, 1)) ** batch
    none_cold_L = np.prod(np.where(resident_LE, 1.0, 1 - read_LE), axis=1)
    # There every token has all of its experts among the residents.
    resident_p_LE = np.where(resident_LE, p_LE, 0.0)
    of_residents_L = p_LE.sum(axis=1) / np.maximum(resident_p_LE.sum(axis=1), 1e-12)
    alone_LE = 1 - (1 - np.clip(resident_p_LE * of_residents_L[:, None], 0, 1)) ** batch
    # Probabilities of independent experts know nothing of K: no more are read than residents are expected to be.
    alone_L = np.minimum(none_cold_L * alone_LE.sum(axis=1), np.where(resident_LE, read_LE, 0.0).sum(axis=1))
    return Traffic(
        cold_experts=float(read_LE[~resident_LE].sum()),
        resident_experts=float(read_LE[resident_LE].sum()),
        layers_with_cold=float((1 - none_cold_L).sum()),
        residents_alone=float(alone_L.sum()),
    )


def bound_s(
    traffic: Traffic, expert_bytes: int, top: Ceilings, floor_s: float, cold_bytes_per_s: float
) -> float:
    """cold_bytes_per_s: when the step was timed."""
    resident_s = expert_bytes / top.hbm_read_bytes_per_s
    alone_s = traffic.residents_alone * resident_s
    beside_s = (traffic.resident_experts - traffic.residents_alone) * resident_s
    cold_s = traffic.cold_experts * expert_bytes / cold_bytes_per_s
    return max(cold_s, beside_s) + alone_s + floor_s + traffic.layers_with_cold * top.round_trip_s


@dataclass(frozen=True)
class Row:
    """One contender in one case. Times are of a step of the whole model.

    contender: who. group: monde, lru, hybrid, offload, resident graph, resident eager, floor. budget: as asked for,
    "" where it has no say. measured_layers: fewer than the model's where the times are scaled from a shorter model.
    """

    contender: str
    group: str
    budget: str
    skew: str
    batch: int
    context: int
    median_s: float
    samples_s: list[float]
    bound_s: float
    measured_layers: int
    figures: dict[str, Any]
    skipped: str = ""

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.median_s if self.median_s else 0.0

    @property
    def of_bound(self) -> float:
        return self.bound_s / self.median_s if self.median_s else 0.0


@dataclass(frozen=True)
class Target:
    """One line: what was wanted and what came out; met is None where the run did not measure it."""

    what: str
    wanted: float
    got: float | None
    worst: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.got is None else self.got >= self.wanted


def targets(rows: list[Row], round_trip_s: float | None) -> list[Target]:
    """The targets of decode at batch 1; ratios are of medians, the worst case counts.

    A hybrid whose own costs sent no expert to its CPU only fetched, and says nothing of hybrids.
    """
    ones = [row for row in rows if row.batch == 1 and not row.skipped and not _only_fetched(row)]
    monde = [row for row in ones if row.group == "monde"]
    some_cold = [row for row in monde if row.budget != "all"]
    everything = [row for row in monde if row.budget == "all"]
    at_16 = [row for row in monde if row.budget == "16GiB" and row.skew != "uniform"]
    of_bound = _worst([(row.of_bound, row) for row in monde])
    lines = [
        _target("monde: share of the bound", 0.85, of_bound),
        _target("monde over the LRU fetcher", 3.0, _against(some_cold, ones, ("lru",))),
        _target("monde over the best hybrid", 1.3, _against(some_cold, ones, ("hybrid",))),
        _target("monde over accelerate's offload", 10.0, _against(some_cold, ones, ("offload",))),
        _target(
            "all resident over transformers in one graph",
            1.25,
            _against(everything, ones, ("resident graph",)),
        ),
        _target("all resident over transformers eager", 5.0, _against(everything, ones, ("resident eager",))),
        _target("16 GiB, skewed, over transformers eager", 1.0, _against(at_16, ones, ("resident eager",))),
    ]
    if round_trip_s:
        lines.append(Target("12 us over the round trip of a layer", 1.0, 12e-6 / round_trip_s))
    return lines


def _only_fetched(row: Row) -> bool:
    return row.group == "hybrid" and row.figures.get("num_on_cpu_per_step") == 0


def _target(what: str, wanted: float, found: tuple[float, Row] | None) -> Target:
    if found is None:
        return Target(what, wanted, None)
    got, row = found
    return Target(what, wanted, got, f"{row.budget}, {row.skew}, context {row.context}")


def _against(mine: list[Row], rows: list[Row], groups: tuple[str, ...]) -> tuple[float, Row] | None:
    """The worst ratio of a rival's time over ours; per case the fastest rival counts."""
    ratios = []
    for row in mine:
        rivals = [
            other.median_s
            for other in rows
            if other.group in groups
            and other.context == row.context
            and other.budget in ("", row.budget)
            and other.skew in ("", row.skew)
        ]
        if rivals:
            ratios.append((min(rivals) / row.median_s, row))
    return _worst(ratios)


def _worst(found: list[tuple[float, Row]]) -> tuple[float, Row] | None:
    return min(found, key=lambda pair: pair[0]) if found else None
