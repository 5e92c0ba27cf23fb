"""Gradients beside the backward: no plan of the same grid is quicker, and none reduces what is not there yet."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monde.planning.fit import AlphaBeta
from monde.planning.gradient_slices import (
    BackwardLayer,
    GradientPlan,
    backward_layer_schedule,
    plan_gradients,
)
from monde.planning.pipeline import COMPUTE, Stage, Stages
from monde.planning.profile import Overlap
from monde.planning.schedule import Resource
from monde.planning.simulate import Contention, simulate

CONTENTION: Contention = {(COMPUTE, Resource.LINK_INTER): Overlap(1.2, 1.3)}
UNITS = 4
times = st.floats(0.05, 1.0)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[BackwardLayer], AlphaBeta, int]:
    num_elements = UNITS * 10
    layers = []
    ready = num_elements
    for _ in range(draw(st.integers(1, 2))):  # in order of forward: the last one's gradients come first
        stages = Stages(Stage(0.01, draw(times)), *(Stage(0.01, draw(times)) for _ in range(4)))
        layers.append(BackwardLayer(stages, draw(st.integers(1, 3)), draw(times), ready))
        ready = draw(st.integers(0, ready))
    return layers, AlphaBeta(draw(st.floats(0, 0.2)), draw(st.floats(0.001, 0.05))), num_elements


def total_s(
    layers: list[BackwardLayer], beside: list[int], after: list[int], cost: AlphaBeta, size: int
) -> float:
    spent = sum(
        simulate(
            backward_layer_schedule(layer, float(cost.seconds(b)), float(cost.seconds(a))), CONTENTION
        ).makespan_s
        for layer, b, a in zip(layers, beside, after, strict=True)
    )
    return spent + float(cost.seconds(size - sum(beside) - sum(after)))


def is_possible(layers: list[BackwardLayer], beside: list[int], after: list[int]) -> bool:
    done = 0
    for layer, b, a in reversed(list(zip(layers, beside, after, strict=True))):
        done += b + a
        if (b or a) and done > layer.ready_elements:
            return False
    return True


@settings(max_examples=20, deadline=None)
@given(problems())
def test_nothing_on_the_grid_is_quicker(problem: tuple[list[BackwardLayer], AlphaBeta, int]) -> None:
    layers, cost, size = problem
    plan = plan_gradients(layers, cost, size, CONTENTION, UNITS)
    unit = size // UNITS
    best = min(
        total_s(layers, list(dealt[: len(layers)]), list(dealt[len(layers) :]), cost, size)
        for dealt in itertools.product(range(0, size + 1, unit), repeat=2 * len(layers))
        if sum(dealt) <= size and is_possible(layers, list(dealt[: len(layers)]), list(dealt[len(layers) :]))
    )
    assert plan.predicted_s == pytest.approx(best)
    assert is_possible(layers, list(plan.beside), list(plan.after))
    assert sum(plan.beside) + sum(plan.after) + plan.end_elements == size
    assert total_s(layers, list(plan.beside), list(plan.after), cost, size) == pytest.approx(best)


def windowed(exp_s: float, dense_s: float) -> GradientPlan:
    stages = Stages(Stage(0.0, exp_s), Stage(0.0, 0.1), Stage(0.0, 0.1))
    layers = [BackwardLayer(stages, 1, dense_s, 100), BackwardLayer(stages, 1, dense_s, 50)]
    return plan_gradients(layers, AlphaBeta(0.0, 0.01), 100, {}, 20)


def test_a_window_is_filled_and_the_rest_waits() -> None:
    """0.4 s of experts hide 40 elements of 0.01 s a layer; the last layer may have 50, of which it takes 40."""
    plan = windowed(0.4, 0.0)
    assert plan.predicted_s == pytest.approx(2 * 0.6 + 0.2)
    assert plan.beside == (40, 40)
    assert plan.end_elements == 20


def test_dense_compute_is_a_window_too() -> None:
    plan = windowed(0.4, 0.3)
    assert plan.predicted_s == pytest.approx(2 * 0.9)
    assert plan.end_elements == 0


def test_nothing_to_reduce() -> None:
    stages = Stages(Stage(0.0, 1.0))
    plan = plan_gradients([BackwardLayer(stages, 1, 0.5, 0)], AlphaBeta(0.1, 0.1), 0, {})
    assert plan == GradientPlan((0,), (0,), 0, 1.5)
