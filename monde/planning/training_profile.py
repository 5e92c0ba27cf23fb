"""What a layer in training costs on this mesh, as measured: from rows to stages, degrees, and whether it still holds.

N nodes of L ranks. Rows are those that the busiest node computes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from monde.planning.fit import AlphaBeta
from monde.planning.pipeline import (
    COMBINE,
    COMPUTE,
    DISPATCH,
    EXPERTS,
    GATHER,
    SCATTER,
    Degrees,
    Stage,
    Stages,
    best_degree,
    layer_timeline,
)
from monde.planning.profile import Overlap
from monde.planning.schedule import Resource
from monde.planning.simulate import Contention

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class TrainingProfile:
    """inter, intra: seconds of one all-to-all over the bytes that a rank sends to others; None where there is no such
    link. forward, backward: seconds of the experts over rows. all_reduce: over elements.
    compute_inter slows (experts, all-to-all between nodes), and so on.
    """

    num_nodes: int
    num_local: int
    row_bytes: int
    forward: AlphaBeta
    backward: AlphaBeta
    inter: AlphaBeta | None
    intra: AlphaBeta | None
    all_reduce: AlphaBeta | None
    compute_inter: Overlap = field(default_factory=Overlap)
    compute_intra: Overlap = field(default_factory=Overlap)
    inter_intra: Overlap = field(default_factory=Overlap)

    @property
    def contention(self) -> Contention:
        return {
            (COMPUTE, Resource.LINK_INTER): self.compute_inter,
            (COMPUTE, Resource.LINK_INTRA): self.compute_intra,
            (Resource.LINK_INTER, Resource.LINK_INTRA): self.inter_intra,
        }

    def stages(self, direction: str, busiest_rows: int) -> Stages:
        """Rows spread evenly over their sources; a rank of the busiest node sends and receives this."""
        compute = self.forward if direction == FORWARD else self.backward
        node_bytes = busiest_rows * self.row_bytes
        between = node_bytes / self.num_local * (self.num_nodes - 1) / self.num_nodes
        inside = node_bytes * (self.num_local - 1) / self.num_local
        inter, intra = _stage(self.inter, between), _stage(self.intra, inside)
        return Stages(_must(_stage(compute, busiest_rows)), inter, inter, intra, intra)


def _stage(cost: AlphaBeta | None, size: float) -> Stage | None:
    return None if cost is None else Stage(cost.alpha_s, size * cost.s_per_unit)


def _must(stage: Stage | None) -> Stage:
    assert stage is not None
    return stage


@dataclass(frozen=True)
class Observation:
    """How one way through a layer went: seconds of every stage, its chunks together; of the whole, from start to end;
    and until the next one began (0 for the last).
    """

    direction: str
    degree: int
    busiest_rows: int
    seconds_s: dict[str, float]
    total_s: float = 0.0
    idle_after_s: float = 0.0


_COST_OF = {DISPATCH: "inter", COMBINE: "inter", GATHER: "intra", SCATTER: "intra"}


def drift(profile: TrainingProfile, observations: Sequence[Observation]) -> dict[str, float]:
    """By cost of the profile (inter, intra, forward, backward): how many times longer stages took than simulated.

    The simulation has the same tasks side by side, so interference is not taken for drift. Medians: one late stage
    in two is not believed.
    """
    ratios: dict[str, list[float]] = {}
    for seen in observations:
        timeline = layer_timeline(
            profile.stages(seen.direction, seen.busiest_rows), seen.degree, profile.contention
        )
        simulated_s: dict[str, float] = {}
        for span in timeline.spans:
            stage = span.name.split()[0]
            simulated_s[stage] = simulated_s.get(stage, 0.0) + span.end_s - span.start_s
        for stage, seconds_s in simulated_s.items():
            if seconds_s > 0 and stage in seen.seconds_s:
                cost = seen.direction if stage == EXPERTS else _COST_OF[stage]
                ratios.setdefault(cost, []).append(seen.seconds_s[stage] / seconds_s)
    return {cost: statistics.median(values) for cost, values in ratios.items()}


def refitted(profile: TrainingProfile, drifted: dict[str, float]) -> TrainingProfile:
    """The profile with those costs scaled."""

    for name, ratio in drifted.items():
        cost: AlphaBeta = getattr(profile, name)
        scaled = replace(cost, alpha_s=cost.alpha_s * ratio, s_per_unit=cost.s_per_unit * ratio)
        changes: dict[str, Any] = {name: scaled}
        profile = replace(profile, **changes)
    return profile


@dataclass
class DegreePlanner:
    """Degrees for any load, from a profile that follows what is observed.

    Equal on all ranks as long as they hand in the same observations. tolerance: drift that is put up with. slack: gains
    below it are not worth more chunks, being less than a prediction is good for. num_observed: observations of one look.
    """

    profile: TrainingProfile
    tolerance: float = 0.25
    slack: float = 0.05
    num_observed: int = 8
    num_refits: int = 0
    _known: dict[int, Degrees] = field(default_factory=dict)
    _seen: list[Observation] = field(default_factory=list)

    def __call__(self, busiest_rows: int) -> Degrees:
        """Loads within a quarter of each other share their degrees: a search takes milliseconds, a step may not."""
        load = _rounded(busiest_rows)
        if load not in self._known:
            forward, backward = (
                best_degree(self.profile.stages(way, load), self.profile.contention, slack=self.slack)
                for way in (FORWARD, BACKWARD)
            )
            self._known[load] = Degrees(forward, backward)
        return self._known[load]

    def trials(self, busiest_rows: int) -> list[Degrees]:
        """What is worth a step each before the model is believed: its own choice, none, and powers of two."""
        powers = [Degrees(r, r) for r in (1, 2, 4, 8, 16)]
        return list(dict.fromkeys([self(busiest_rows), *powers]))

    def settle(self, busiest_rows: int, observations: Sequence[Observation]) -> Degrees:
        """Degrees for this load as measured, in place of those of the model; each way the fewest chunks whose median is
        within `slack` of the best. Links are not always alpha and beta: a measurement that there is beats them.
        """
        best = {}
        for way in (FORWARD, BACKWARD):
            by_degree: dict[int, list[float]] = {}
            for seen in observations:
                if seen.direction == way:
                    by_degree.setdefault(seen.degree, []).append(seen.total_s)
            medians = {degree: statistics.median(totals) for degree, totals in by_degree.items()}
            best[way] = min(d for d, m in medians.items() if m <= min(medians.values()) * (1 + self.slack))
        self._known[_rounded(busiest_rows)] = Degrees(best[FORWARD], best[BACKWARD])
        return self(busiest_rows)

    def to_confirm(self, busiest_rows: int, num_rounds: int) -> list[Degrees]:
        """Steps without chunks and as settled, in turn; none where nothing was settled that needs it.

        The best of several that were tried twice is as likely lucky as good, so that what is no gain would be kept.
        """
        settled = self(busiest_rows)
        return [] if settled == Degrees() else [Degrees(), settled] * num_rounds

    def confirm(self, busiest_rows: int, observations: Sequence[Observation]) -> Degrees:
        """observations: of `to_confirm`. Each way keeps its chunks if the median over pairs of steps gains `slack`."""
        settled, kept = self(busiest_rows), {}
        for way, degree in ((FORWARD, settled.forward), (BACKWARD, settled.backward)):
            mine = [seen for seen in observations if seen.direction == way]
            without, with_chunks = ([o.total_s for o in mine if o.degree == d] for d in (1, degree))
            ratios = [a / b for a, b in zip(with_chunks, without, strict=False)]
            kept[way] = degree if ratios and statistics.median(ratios) <= 1 - self.slack else 1
        self._known[_rounded(busiest_rows)] = Degrees(kept[FORWARD], kept[BACKWARD])
        return self(busiest_rows)

    def correct(self, observations: Sequence[Observation]) -> None:
        """Scale the profile to what was observed, keeping degrees that were settled."""
        self.profile = refitted(self.profile, drift(self.profile, observations))

    def observe(self, observations: Sequence[Observation]) -> bool:
        """Whether the profile was fitted again, and all degrees with it."""
        self._seen.extend(observations)
        if len(self._seen) < self.num_observed:
            return False
        drifted = drift(self.profile, self._seen)
        self._seen.clear()
        off = {name: ratio for name, ratio in drifted.items() if max(ratio, 1 / ratio) > 1 + self.tolerance}
        if not off:
            return False
        self.profile = refitted(self.profile, off)
        self._known.clear()
        self.num_refits += 1
        return True


def _rounded(rows: int) -> int:
    """To the nearest of 1, 1.25, 1.56, ... : steps of a quarter."""
    size = 1.0
    while size * 1.25**0.5 < rows:
        size *= 1.25
    return round(size)
