"""Steps correct predictions: a way that is not as fast as predicted is tried, noted and left."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from monde.planning.sharding import BatchPlan, Way, WayFactors, plan_batch
from monde.planning.sharding_feedback import StepFeedback
from tests.planning.test_sharding import COST, counts

LOAD = counts([3000] * 4 + [1200] * 12)  # peers are predicted to take longer by over half


def after_steps(slow: WayFactors, num_steps: int) -> tuple[list[Way], StepFeedback]:
    """The ways taken where each takes `slow` times what its costs say."""
    feedback, ways = StepFeedback(), []
    true = plan_batch(LOAD, COST)
    for _ in range(num_steps):
        factors = feedback.factors(26_400)
        plan = plan_batch(LOAD, COST, factors=factors)
        ways.append(plan.way)
        sharded = plan.way is Way.SHARDED
        feedback.note(
            plan,
            factors,
            26_400,
            true.sharded_s * slow.sharded if sharded else true.peers_s * slow.peers,
        )
    return ways, feedback


def test_the_way_that_is_faster_is_found() -> None:
    assert set(after_steps(WayFactors(), 9)[0]) == {Way.SHARDED}
    ways, feedback = after_steps(WayFactors(sharded=1.5), 9)
    assert ways[0] is Way.SHARDED
    assert set(ways[1:]) == {Way.PEERS}
    assert feedback.factors(26_400).sharded == pytest.approx(1.5)
    # Both slow alike, as on a machine that others load: peers are tried and left again.
    ways, _ = after_steps(WayFactors(1.5, 1.5), 9)
    assert set(ways[3:]) == {Way.SHARDED}


def test_one_late_step_and_other_sizes_change_nothing() -> None:
    feedback, plan = StepFeedback(), BatchPlan(Way.SHARDED, 1, 1.0, 2.0, 1.0)
    for measured_s in (1.0, 30.0, 1.1):
        feedback.note(plan, WayFactors(), 26_400, measured_s)
    assert feedback.factors(26_400) == WayFactors(1.1, 1.0)
    assert feedback.factors(3) == WayFactors()


def test_ratios_are_to_what_costs_alone_predict() -> None:
    """A plan made with a factor of 2 says 2 s; 3 s measured are 3 times what the costs said."""
    feedback = StepFeedback()
    feedback.note(BatchPlan(Way.PEERS, 1, 1.0, 2.0, 1.0), WayFactors(peers=2.0), 5, 3.0)
    assert feedback.factors(5).peers == pytest.approx(3)


def test_nothing_is_noted_of_plans_without_costs_or_steps_that_were_not_timed() -> None:
    feedback = StepFeedback()
    feedback.note(BatchPlan(Way.SHARDED, 1, math.nan, math.nan, math.nan), WayFactors(), 5, 1.0)
    feedback.note(replace(plan_batch(LOAD, COST), way=Way.SHARDED), WayFactors(), 5, 0.0)
    assert feedback.factors(5) == WayFactors()
