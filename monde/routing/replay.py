"""A recorded trace through a residency policy: how often experts were found on the device, and at what traffic.

Policies differ in two things only: the value an expert has, and when swaps are planned.
    uniform   no value: slots spread evenly, first experts; never changes
    static    heat of another run; never changes
    lru       the step of last use; every step, as many swaps as it takes
    dynamic   decayed counts; every few steps, few swaps, with hysteresis
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from monde.core import NOT_MINE, Placement
from monde.planning.budget import LayerSize
from monde.planning.placement import Swap, apply_swaps, place, place_uniform, plan_swaps
from monde.routing.heat import Heat, HeatTracker
from monde.routing.trace import Trace, hits


class Residency(StrEnum):
    UNIFORM = "uniform"
    STATIC = "static"
    LRU = "lru"
    DYNAMIC = "dynamic"


@dataclass(frozen=True)
class DynamicSettings:
    """How the dynamic policy replans: every interval_steps, at most max_swaps over all layers.

    sees_chance: counts are taken for no more than they tell (Heat.likely_count_L), so that experts of equal popularity
    stay where they are. min_gain: tokens of these counts that a swap must promise. It reads one expert, and the counts
    remember about as many steps as its promise holds for; of 0 to 4, in routing that drifts and that does not, 2 read
    least in all.
    """

    half_life_steps: float = 32  # of 8 to 128 the best on a trained model, at a fraction of LRU's traffic
    interval_steps: int = 4
    max_swaps: int = 96
    hysteresis: float = 0.1
    sees_chance: bool = True
    min_gain: float = 2.0

    def plan(self, current: Sequence[Placement], heat: Heat, max_swaps: int) -> list[Swap]:
        """The swaps of one round."""
        value_L = heat.likely_count_L if self.sees_chance else heat.count_L
        return plan_swaps(current, value_L, max_swaps, self.hysteresis, self.min_gain)


@dataclass(frozen=True)
class Replay:
    num_pairs: int
    num_hits: int
    num_swaps: int
    swap_bytes: int

    @property
    def hit_rate(self) -> float:
        return self.num_hits / self.num_pairs if self.num_pairs else 0.0


def replay(
    trace: Trace,
    policy: Residency,
    layers: Sequence[LayerSize],
    budget_bytes: int,
    heat: Heat | None = None,
    settings: DynamicSettings | None = None,
) -> Replay:
    """Run `trace` under a budget for slots. A step is served from the placement of its beginning.

    heat: known beforehand; static needs it, lru and dynamic start from it, uniform does without.
    Errors: ValueError when static has no heat, or heat is of another model.
    """
    if policy is Residency.STATIC and heat is None:
        raise ValueError("replay: the static policy needs a heat file; record one, or use dynamic")
    if heat is not None:
        heat.check("the trace", trace.num_experts_L)
    if heat is None or policy is Residency.UNIFORM:
        placements = place_uniform(layers, budget_bytes)
    else:
        placements = place(heat.count_L, layers, budget_bytes)
    settings = settings or DynamicSettings()
    planner = _Planner(trace.num_experts_L, policy, settings, heat)
    num_hits = num_pairs = num_swaps = swap_bytes = 0
    for step in trace.steps:
        found, asked = hits(placements, step)
        num_hits, num_pairs = num_hits + found, num_pairs + asked
        planner.observe(step)
        swaps = planner.swaps(placements)
        placements = apply_swaps(placements, swaps)
        num_swaps += len(swaps)
        swap_bytes += sum(layers[swap.layer].slot_bytes for swap in swaps)
    return Replay(num_pairs, num_hits, num_swaps, swap_bytes)


class _Planner:
    """What a policy makes of the steps seen."""

    def __init__(
        self, num_experts_L: tuple[int, ...], policy: Residency, settings: DynamicSettings, heat: Heat | None
    ) -> None:
        self._policy, self._settings = policy, settings
        self._tracker = HeatTracker(num_experts_L, settings.half_life_steps)
        if heat is not None:
            self._tracker.load(heat)
        self._last_used_L = [np.zeros(n) for n in num_experts_L]
        self._num_steps = 0

    def observe(self, step: Sequence[NDArray[np.int16]]) -> None:
        self._num_steps += 1
        self._tracker.step()
        for l, ids_TK in enumerate(step):
            if self._policy is Residency.LRU:
                self._last_used_L[l][ids_TK[ids_TK != NOT_MINE]] = self._num_steps
            elif self._policy is Residency.DYNAMIC:
                self._tracker.update(l, ids_TK, np.ones(ids_TK.shape, np.float32))

    def swaps(self, placements: Sequence[Placement]) -> list[Swap]:
        """Before the next step."""
        if self._policy is Residency.LRU:
            return plan_swaps(placements, self._last_used_L, sum(self._tracker.num_experts_L), 0.0)
        if self._policy is Residency.DYNAMIC and self._num_steps % self._settings.interval_steps == 0:
            return self._settings.plan(placements, self._tracker.read(), self._settings.max_swaps)
        return []
