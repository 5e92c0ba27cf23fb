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

from monde.core import NOT_MINE
from monde.planning.budget import LayerSize
from monde.planning.placement import apply_swaps, place, place_uniform, plan_swaps
from monde.routing.heat import Heat, HeatTracker
from monde.routing.trace import Trace, hits


class Residency(StrEnum):
    UNIFORM = "uniform"
    STATIC = "static"
    LRU = "lru"
    DYNAMIC = "dynamic"


@dataclass(frozen=True)
class DynamicSettings:
    """How the dynamic policy replans: every interval_steps, at most max_swaps over all layers."""

    half_life_steps: float = 32  # of 8 to 128 the best on a trained model, at a thirtieth of LRU's traffic
    interval_steps: int = 4
    max_swaps: int = 96
    hysteresis: float = 0.2


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
    values = _Values(trace.num_experts_L, policy, settings, heat)
    num_hits = num_pairs = num_swaps = swap_bytes = 0
    for s, step in enumerate(trace.steps):
        found, asked = hits(placements, step)
        num_hits, num_pairs = num_hits + found, num_pairs + asked
        values.observe(step)
        if policy is Residency.LRU:
            swaps = plan_swaps(placements, values.read(), sum(trace.num_experts_L), 0.0)
        elif policy is Residency.DYNAMIC and (s + 1) % settings.interval_steps == 0:
            swaps = plan_swaps(placements, values.read(), settings.max_swaps, settings.hysteresis)
        else:
            continue
        placements = apply_swaps(placements, swaps)
        num_swaps += len(swaps)
        swap_bytes += sum(layers[swap.layer].slot_bytes for swap in swaps)
    return Replay(num_pairs, num_hits, num_swaps, swap_bytes)


class _Values:
    """What experts are worth to a policy after the steps seen."""

    def __init__(
        self, num_experts_L: tuple[int, ...], policy: Residency, settings: DynamicSettings, heat: Heat | None
    ) -> None:
        self._policy = policy
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

    def read(self) -> Sequence[NDArray[np.floating]]:
        return self._last_used_L if self._policy is Residency.LRU else self._tracker.read().count_L
