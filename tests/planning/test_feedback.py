"""Plans that follow what was measured: they settle where both sides end together, whatever the profile said."""

from __future__ import annotations

import numpy as np
import pytest

from monde.planning.cost import CostModel, ExpertShape
from monde.planning.feedback import LIMIT, Feedback
from monde.planning.machines import DESCRIBED
from monde.planning.split import Load, best_split

BASE = CostModel(DESCRIBED["h200"], ExpertShape(2048, 768))
LOAD = Load(np.full(128, 128), np.zeros(128, bool), 2048, 32)


@pytest.mark.parametrize(
    ("host", "copy", "close"), [(1.0, 1.0, True), (1.01, 0.99, True), (1.03, 1.0, False), (1.0, 0.97, False)]
)
def test_factors_that_make_another_plan(host: float, copy: float, close: bool) -> None:
    assert Feedback(2 * host, 0.5 * copy).is_close(Feedback(2, 0.5)) == close


@pytest.mark.parametrize(("host", "copy"), [(1.001, 1.0), (2.0, 1.0), (0.5, 1.2), (0.7, 2.0), (3.0, 0.9)])
def test_both_sides_end_together_after_a_few_layers(host: float, copy: float) -> None:
    """A machine whose host and bus take other factors of the profile's seconds, and do not slow each other."""
    real = Feedback(host, copy).cost(BASE)
    feedback, ends = Feedback(), []
    for _ in range(12):
        cost = feedback.cost(BASE)
        split = best_split(LOAD, cost)
        trip_s = cost.prompt_trip_s(2048)
        host_s = (split.host_s - trip_s) * host / feedback.host
        copy_s = split.copy_s * copy / feedback.copy
        ends.append(max(split.launch_s + split.gemm_s, host_s + trip_s, split.lead_s + copy_s))
        feedback = feedback.after_host(split.host_s - trip_s, host_s).after_copy(split.copy_s, copy_s)
    assert ends[-1] == pytest.approx(best_split(LOAD, real).makespan_s, rel=0.05)
    assert feedback.host == pytest.approx(host, rel=0.02)
    assert feedback.copy == pytest.approx(copy, rel=0.02)


def test_one_stall_moves_a_plan_by_little_and_never_without_end() -> None:
    assert Feedback().after_host(1.0, 4.0).host == pytest.approx(2.0)
    feedback = Feedback()
    for _ in range(20):
        feedback = feedback.after_copy(1.0, 100.0)
    assert feedback.copy == LIMIT
    assert Feedback().after_host(0.0, 1.0) == Feedback().after_copy(1.0, 0.0) == Feedback()
    assert Feedback().cost(BASE) is BASE
