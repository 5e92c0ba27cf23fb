"""Schedules of whole steps: what the split promises, the simulator delivers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monde.planning.cost import CostModel, ExpertShape
from monde.planning.machines import DESCRIBED
from monde.planning.simulate import contention_of, simulate
from monde.planning.split import Load
from monde.planning.split_policies import SPLIT_POLICIES
from monde.planning.step import LayerStep, step_schedule

SHAPE = ExpertShape(2048, 768)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=16),
    st.sampled_from(sorted(DESCRIBED)),
    st.sampled_from(sorted(SPLIT_POLICIES)),
)
def test_a_simulated_layer_takes_what_its_split_says(
    experts: list[tuple[int, bool]], machine: str, policy: str
) -> None:
    """The split's lanes know no order within them: the last product after the last copy comes on top."""
    cost = CostModel(DESCRIBED[machine], SHAPE)
    load = Load(np.array([t for t, _ in experts]), np.array([r for _, r in experts]), 300, 64)
    split = SPLIT_POLICIES[policy](load, cost)
    timeline = simulate(step_schedule([LayerStep(0.0, load, split)], cost), contention_of(cost.profile))
    tail_s = float(cost.resident_s(load.tokens_E).max())
    # While three lanes run, the copy is slowed by both others, in the split by the worse of them.
    gpu_slows = cost.gpu.gpu_while_copying.second
    # The split takes the bus for busy from the start, the schedule only after what holds it up.
    overlap = cost.gpu.host_while_copying
    early_s = split.lead_s * (max(overlap.first, overlap.second, gpu_slows) - 1)
    assert (split.makespan_s - early_s) * (1 - 1e-6) <= timeline.makespan_s
    assert timeline.makespan_s <= (split.makespan_s + tail_s) * gpu_slows * 1.02


def test_layers_follow_each_other() -> None:
    cost = CostModel(DESCRIBED["h200"], SHAPE)
    load = Load(np.full(8, 2), np.arange(8) < 4, 2, 64)
    split = SPLIT_POLICIES["best"](load, cost)
    one = simulate(step_schedule([LayerStep(1e-4, load, split)], cost)).makespan_s
    three = simulate(step_schedule([LayerStep(1e-4, load, split)] * 3 + [LayerStep(5e-5)], cost)).makespan_s
    assert three == pytest.approx(3 * one + 5e-5)
