"""What a profile cannot know: how much slower or faster the host and the bus are now than it says.

Machines are shared and a profile may be another machine's. Every layer of a prompt tells how long its host share
and its copies took beside one another; the ratio to what was planned scales the next plan. Bounded, so that one
stalled step does not throw the plan over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from monde.planning.cost import CostModel
from monde.planning.fit import AlphaBeta
from monde.planning.profile import Curve, ExpertRate, HardwareProfile, Overlap

KEEP = 0.5  # of the old factor, in logarithms: a step's noise counts half, three steps are as good as settled
CLOSE = 1.02  # factors this near to each other make the same plan
LIMIT = 8.0  # most that a factor may be off, either way


@dataclass(frozen=True)
class Feedback:
    """Factors on the profile's seconds. 1 until something was measured."""

    host: float = 1.0
    copy: float = 1.0

    def after_host(self, planned_s: float, measured_s: float) -> Feedback:
        """planned_s is what this feedback's own cost model said, alone; measured beside the copies."""
        return replace(self, host=_moved(self.host, planned_s, measured_s))

    def after_copy(self, planned_s: float, measured_s: float) -> Feedback:
        return replace(self, copy=_moved(self.copy, planned_s, measured_s))

    def is_close(self, other: Feedback) -> bool:
        ratios = (self.host / other.host, self.copy / other.copy)
        return all(1 / CLOSE <= ratio <= CLOSE for ratio in ratios)

    def cost(self, base: CostModel) -> CostModel:
        """Host and bus at today's speed. What was measured was measured side by side: no slow-down on top."""
        if self.host == self.copy == 1.0:
            return base
        profile: HardwareProfile = base.profile
        gpu = base.gpu
        h2d = AlphaBeta(gpu.h2d.alpha_s * self.copy, gpu.h2d.s_per_unit * self.copy)
        gpu = replace(gpu, h2d=h2d, host_while_copying=Overlap())
        slower = profile.with_host(lambda rate: _slower(rate, self.host))
        return replace(base, profile=replace(slower, gpu=gpu))


def _moved(factor: float, planned_s: float, measured_s: float) -> float:
    if planned_s <= 0 or measured_s <= 0:
        return factor
    moved = factor * float((measured_s / planned_s) ** (1 - KEEP))
    return min(LIMIT, max(1 / LIMIT, moved))


def _slower(rate: ExpertRate, factor: float) -> ExpertRate:
    curve = Curve(rate.flops_per_s.x, tuple(y / factor for y in rate.flops_per_s.y))
    return ExpertRate(rate.overhead_s * factor, rate.bytes_per_s / factor, curve)
