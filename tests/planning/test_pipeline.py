"""The pipeline of a layer: closed forms where the paper's cases are exact, bounds where they are not, degrees."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monde.planning.pipeline import (
    COMPUTE,
    MAX_DEGREE,
    Degrees,
    Stage,
    Stages,
    backward_of,
    best_degree,
    layer_schedule,
    layer_timeline,
    one_lane,
)
from monde.planning.profile import Overlap
from monde.planning.schedule import Resource
from monde.planning.simulate import simulate

degrees = st.integers(1, MAX_DEGREE)
seconds = st.floats(0.01, 1.0)


def stages(a2a: Stage, ag: Stage, rs: Stage, exp: Stage) -> Stages:
    return Stages(exp, a2a, a2a, ag, rs)


def per_chunk(r: int, a2a: float, ag: float, rs: float, exp: float) -> Stages:
    """Stages whose chunks of degree r take these seconds."""
    return stages(*(Stage(0.0, r * s) for s in (a2a, ag, rs, exp)))


@given(degrees, seconds, seconds, seconds)
def test_compute_bound(r: int, a2a: float, ag: float, rs: float) -> None:
    """Case 2, 2 a2a + ag + rs + r exp: experts take longer than any link, and the gradients fit."""
    exp = 2 * a2a + ag + rs
    made = layer_timeline(per_chunk(r, a2a, ag, rs, exp), r, {})
    assert made.makespan_s == pytest.approx(2 * a2a + ag + rs + r * exp)


@given(degrees, seconds, seconds, seconds, st.floats(1.0, 10.0))
def test_inter_bound_with_gradients(r: int, a2a: float, ag: float, rs: float, gar: float) -> None:
    """Case 1, 2 r a2a + gar: all else is over by the time the gradients are reduced."""
    exp = a2a / 4
    gar += r * (ag + rs + exp)
    made = layer_timeline(per_chunk(r, a2a, ag, rs, exp), r, {}, [gar])
    assert made.makespan_s == pytest.approx(2 * r * a2a + gar)


@given(degrees, seconds, seconds)
def test_a2a_bound(r: int, a2a: float, share: float) -> None:
    """Case 3, 2 r a2a + ag + rs, is an upper bound here: what follows the last dispatch hides behind combines."""
    ag = rs = share * a2a / 4
    exp = share * a2a / 4
    made_s = layer_timeline(per_chunk(r, a2a, ag, rs, exp), r, {}).makespan_s
    assert 2 * r * a2a - 1e-9 <= made_s <= 2 * r * a2a + ag + rs + exp + 1e-9


@given(degrees, seconds, seconds, seconds)
def test_intra_bound(r: int, a2a: float, ag: float, rs: float) -> None:
    """Case 4, 2 a2a + r (ag + rs): links inside the node take longest, experts hide between them."""
    ag, rs = ag + a2a, rs + a2a
    exp = min(ag, rs) / 100
    made_s = layer_timeline(per_chunk(r, a2a, ag, rs, exp), r, {}).makespan_s
    assert made_s == pytest.approx(2 * a2a + r * (ag + rs), rel=0.02)


@settings(max_examples=30)
@given(st.floats(1e-3, 0.1), st.floats(0.1, 2.0), st.floats(0.1, 2.0))
def test_the_best_degree_is_next_to_the_closed_form(a_exp: float, n_a2a: float, n_intra: float) -> None:
    """Compute bound: r* = sqrt((2 n_a2a + n_ag + n_rs) / a_exp), in work seconds over the experts' latency."""
    exp = Stage(a_exp, 1000.0)  # so much work that every degree is compute bound
    given_stages = stages(Stage(0.0, n_a2a), Stage(0.0, n_intra), Stage(0.0, n_intra), exp)
    best = math.sqrt((2 * n_a2a + 2 * n_intra) / a_exp)
    found = best_degree(given_stages, {})
    assert found in {min(MAX_DEGREE, max(1, int(best))), min(MAX_DEGREE, math.ceil(best))}


@settings(max_examples=30)
@given(st.floats(1e-3, 0.1), st.floats(0.1, 2.0))
def test_the_best_degree_where_links_inside_take_longest(a_intra: float, n_a2a: float) -> None:
    """Intra bound: r* = sqrt(2 n_a2a / (a_ag + a_rs)), in work seconds over the latencies inside the node."""
    intra = Stage(a_intra, 1000.0)
    found = best_degree(stages(Stage(0.0, n_a2a), intra, intra, Stage(0.0, 1e-6)), {})
    best = math.sqrt(2 * n_a2a / (2 * a_intra))
    assert found in {min(MAX_DEGREE, max(1, int(best))), min(MAX_DEGREE, math.ceil(best))}


def test_enumeration_is_exact_where_no_closed_form_is() -> None:
    contention = {
        (COMPUTE, Resource.LINK_INTER): Overlap(1.3, 1.2),
        (COMPUTE, Resource.LINK_INTRA): Overlap(1.1, 1.4),
    }
    made = stages(Stage(0.01, 1.0), Stage(0.02, 0.7), Stage(0.02, 0.6), Stage(0.03, 2.0))
    by_degree = [layer_timeline(made, r, contention, [0.3]).makespan_s for r in range(1, MAX_DEGREE + 1)]
    assert by_degree[best_degree(made, contention, [0.3]) - 1] == min(by_degree)
    assert len(set(by_degree)) == MAX_DEGREE


@given(degrees, seconds, seconds, seconds, seconds)
def test_two_lanes_never_lose_to_one(r: int, a2a: float, ag: float, rs: float, exp: float) -> None:
    made = per_chunk(r, a2a, ag, rs, exp)
    assert layer_timeline(made, r, {}).makespan_s <= simulate(one_lane(made, r)).makespan_s + 1e-9
    sequential = simulate(one_lane(per_chunk(1, a2a, ag, rs, exp), 1)).makespan_s
    assert sequential == pytest.approx(2 * a2a + ag + rs + exp)


def test_links_that_are_not_there() -> None:
    one_node = Stages(Stage(0.0, 1.0), gather=Stage(0.0, 0.5), scatter=Stage(0.0, 0.5))
    names = [task.name for task in layer_schedule(one_node, 2).tasks]
    assert names == ["gather 0", "gather 1", "experts 0", "scatter 0", "experts 1", "scatter 1"]
    alone = layer_schedule(Stages(Stage(0.0, 1.0)), 3, [0.5])
    assert [task.name for task in alone.tasks] == ["gradients 0", "experts 0", "experts 1", "experts 2"]


def test_backward_has_twice_the_experts() -> None:
    made = backward_of(per_chunk(1, 1.0, 2.0, 3.0, 4.0))
    assert made.experts.work_s == 8.0
    assert made.dispatch == Stage(0.0, 1.0)


def test_order_on_a_lane_is_that_of_the_schedule() -> None:
    made = layer_timeline(per_chunk(4, 0.2, 0.1, 0.1, 0.5), 4, {}, [0.3])
    inter = [span for span in made.spans if span.resource is Resource.LINK_INTER]
    assert [span.name.split()[0] for span in inter] == ["dispatch"] * 4 + ["gradients"] + ["combine"] * 4
    assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(inter))


def test_a_degree_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one chunk each way"):
        Degrees(0, 1)
