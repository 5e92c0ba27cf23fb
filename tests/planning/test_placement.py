"""Placements against all subsets of experts; swaps against all sets of swaps."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from monde.core import Placement
from monde.planning.budget import LayerSize
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.machines import DESCRIBED
from monde.planning.placement import (
    Swap,
    apply_swaps,
    best_experts,
    equal_hits,
    place,
    place_by_time,
    place_uniform,
    plan_swaps,
    swap_limit,
    time_saved_s,
)

Values = list[NDArray[np.float64]]


@st.composite
def models(draw: st.DrawFn) -> tuple[Values, list[LayerSize], int]:
    """Up to 10 experts in up to 4 layers of up to 4 sizes."""
    layers, values, left = [], [], 10
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(0, min(left, 6)))
        left -= n
        slot_bytes = draw(st.sampled_from([1, 3, 5, 7]))
        layers.append(LayerSize(n, slot_bytes, slot_bytes))
        values.append(np.array(draw(st.lists(st.integers(0, 20), min_size=n, max_size=n)), float))
    return values, layers, draw(st.integers(0, 40))


def total(placements: tuple[Placement, ...], value_L: Values) -> float:
    return float(sum(value_L[l][e] for l, p in enumerate(placements) for e in p.resident_experts))


def used_bytes(placements: tuple[Placement, ...], layers: list[LayerSize]) -> int:
    return sum(p.num_resident * layer.expert_bytes for p, layer in zip(placements, layers, strict=True))


def check_slots(placements: tuple[Placement, ...], layers: list[LayerSize]) -> None:
    """Slots of a layer are 0, 1, ... without gaps, one expert each."""
    for placement, layer in zip(placements, layers, strict=True):
        assert len(placement.slot_of_expert_E) == layer.num_experts
        slots = sorted(s for s in placement.slot_of_expert_E if s >= 0)
        assert slots == list(range(placement.num_resident))


@settings(max_examples=300, deadline=None)
@given(models())
def test_no_subset_is_worth_more(model: tuple[Values, list[LayerSize], int]) -> None:
    value_L, layers, budget_bytes = model
    experts = [
        (value_L[l][e], layers[l].slot_bytes) for l in range(len(layers)) for e in range(len(value_L[l]))
    ]
    best = max(
        sum(v for v, _ in chosen)
        for n in range(len(experts) + 1)
        for chosen in combinations(experts, n)
        if sum(b for _, b in chosen) <= budget_bytes
    )
    placements = place(value_L, layers, budget_bytes)
    assert total(placements, value_L) == pytest.approx(best)
    assert used_bytes(placements, layers) <= budget_bytes
    check_slots(placements, layers)


@given(models())
def test_uniform_fits_and_is_even(model: tuple[Values, list[LayerSize], int]) -> None:
    value_L, layers, budget_bytes = model
    placements = place_uniform(layers, budget_bytes, value_L)
    assert used_bytes(placements, layers) <= budget_bytes
    check_slots(placements, layers)
    for placement, value_E in zip(placements, value_L, strict=True):
        resident = set(placement.resident_experts)
        others = [value_E[e] for e in range(len(value_E)) if e not in resident]
        assert min((value_E[e] for e in resident), default=np.inf) >= max(others, default=-np.inf)


def test_equal_values_are_spread_over_the_layers() -> None:
    layers = [LayerSize(8, 10, 10)] * 4
    placements = place([np.ones(8)] * 4, layers, 100)
    assert [p.num_resident for p in placements] == [3, 3, 2, 2]
    assert [p.num_resident for p in place_uniform(layers, 100)] == [3, 3, 2, 2]


def test_skewed_layers_get_more_slots() -> None:
    layers = [LayerSize(8, 10, 10)] * 2
    skewed, flat = np.array([9.0, 8, 7, 6, 0, 0, 0, 0]), np.full(8, 3.0)
    assert [p.num_resident for p in place([skewed, flat], layers, 60)] == [4, 2]


def test_seconds_saved_grow_with_heat_and_end_at_one_read_a_step() -> None:
    cost = CostModel(DESCRIBED["h200"], ExpertShape(2048, 768))
    saved_s = time_saved_s(np.array([0.0, 0.01, 0.1, 1.0, 3.0, 8.0]), cost)
    assert saved_s[0] == 0
    assert (np.diff(saved_s) > 0).all()
    one_read_s = float(cost.host_s(8) - cost.resident_s(8))
    assert saved_s[-1] == pytest.approx(one_read_s, rel=0.01)
    assert saved_s[1] == pytest.approx(0.01 * float(cost.host_s(1) - cost.resident_s(1)), rel=0.02)


# ---- before any routing was seen ----
shapes = st.tuples(
    st.integers(1, 4), st.sampled_from([64, 128, 1024]), st.sampled_from([64, 768]), st.sampled_from([16, 32])
)


@settings(max_examples=100, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 8), st.floats(0, 1.1))
def test_unequal_layers_get_what_saves_most_seconds(
    layers_of: list[tuple[int, int, int, int]], num_topk: int, batch: int, budget_share: float
) -> None:
    layers, costs, hits, experts = [], [], [], []
    for num_experts, d_model, d_ffn, bits in layers_of:
        shape = ExpertShape(d_model, d_ffn, weight_bits=bits)
        layers.append(LayerSize(num_experts, int(shape.expert_bytes), int(shape.expert_bytes)))
        costs.append(CostModel(DESCRIBED["epyc-4090"], shape))
        hits.append(equal_hits(num_experts, num_topk, batch))
        assert hits[-1].sum() == pytest.approx(num_topk * batch)
        experts += [(float(s), layers[-1].slot_bytes) for s in time_saved_s(hits[-1], costs[-1])]
    budget_bytes = int(budget_share * sum(b for _, b in experts))
    best_s = max(
        sum(s for s, _ in chosen)
        for n in range(len(experts) + 1)
        for chosen in combinations(experts, n)
        if sum(b for _, b in chosen) <= budget_bytes
    )
    placements = place_by_time(hits, costs, layers, budget_bytes)
    saved = [time_saved_s(hits_E, cost) for hits_E, cost in zip(hits, costs, strict=True)]
    assert total(placements, saved) == pytest.approx(best_s)
    assert used_bytes(placements, layers) <= budget_bytes


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 500), st.sampled_from(sorted(DESCRIBED)))
def test_equal_layers_are_as_even_as_can_be(
    num_layers: int, num_experts: int, budget_bytes: int, machine: str
) -> None:
    layers = [LayerSize(num_experts, 10, 12)] * num_layers
    cost = CostModel(DESCRIBED[machine], ExpertShape(2048, 768))
    placements = place_by_time(
        [equal_hits(num_experts, 2, 1)] * num_layers, [cost] * num_layers, layers, budget_bytes
    )
    assert placements == place_uniform(layers, budget_bytes)


def test_layers_of_fewer_experts_come_first() -> None:
    """Each of them is taken more often: all of them before any of the others."""
    cost = CostModel(DESCRIBED["h200"], ExpertShape(2048, 768))
    layers = [LayerSize(16, 10, 10), LayerSize(4, 10, 10)]
    hits = [equal_hits(16, 2, 1), equal_hits(4, 2, 1)]
    assert [p.num_resident for p in place_by_time(hits, [cost] * 2, layers, 70)] == [3, 4]


@st.composite
def running(draw: st.DrawFn) -> tuple[tuple[Placement, ...], Values]:
    placements, values = [], []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, 5))
        resident = draw(st.permutations(range(n)))[: draw(st.integers(0, n))]
        placements.append(Placement(tuple(resident.index(e) if e in resident else -1 for e in range(n))))
        values.append(np.array(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), float))
    return tuple(placements), values


def most_gain(placements: tuple[Placement, ...], value_L: Values, max_swaps: int) -> float:
    """By trying, one swap after the other, every exchange in every layer."""
    if max_swaps == 0:
        return 0.0
    best = 0.0
    for l, placement in enumerate(placements):
        for out, slot in enumerate(placement.slot_of_expert_E):
            for into, other in enumerate(placement.slot_of_expert_E):
                gain = value_L[l][into] - value_L[l][out]
                if slot >= 0 and other < 0 and gain > 0:
                    after = apply_swaps(placements, [Swap(l, out, slot, into)])
                    best = max(best, gain + most_gain(after, value_L, max_swaps - 1))
    return best


@settings(max_examples=100, deadline=None)
@given(running(), st.integers(0, 3))
def test_no_swaps_gain_more(state: tuple[tuple[Placement, ...], Values], max_swaps: int) -> None:
    placements, value_L = state
    swaps = plan_swaps(placements, value_L, max_swaps, 0.0)
    assert len(swaps) <= max_swaps
    gained = total(apply_swaps(placements, swaps), value_L) - total(placements, value_L)
    assert gained == pytest.approx(most_gain(placements, value_L, max_swaps))


@given(running(), st.integers(0, 20), st.floats(0, 1))
def test_swaps_are_valid_worth_it_and_stable(
    state: tuple[tuple[Placement, ...], Values], max_swaps: int, hysteresis: float
) -> None:
    placements, value_L = state
    swaps = plan_swaps(placements, value_L, max_swaps, hysteresis)
    for swap in swaps:
        slot_E = placements[swap.layer].slot_of_expert_E
        assert slot_E[swap.expert_out] == swap.slot >= 0
        assert slot_E[swap.expert_in] == -1
        value_E = value_L[swap.layer]
        assert value_E[swap.expert_in] > value_E[swap.expert_out] * (1 + hysteresis)
    assert (
        len({(s.layer, s.slot) for s in swaps}) == len({(s.layer, s.expert_in) for s in swaps}) == len(swaps)
    )
    after = apply_swaps(placements, swaps)
    assert [p.num_resident for p in after] == [p.num_resident for p in placements]
    if len(swaps) < max_swaps:
        exchanged = {(s.layer, e) for s in swaps for e in (s.expert_in, s.expert_out)}
        again = plan_swaps(after, value_L, max_swaps, hysteresis)
        assert not any({(s.layer, s.expert_in), (s.layer, s.expert_out)} <= exchanged for s in again)


def test_hysteresis_keeps_near_equals_where_they_are() -> None:
    placement = (Placement((0, 1, -1, -1)),)
    value_L = [np.array([1.0, 5.0, 1.15, 0.2])]
    assert plan_swaps(placement, value_L, 10, 0.2) == []
    assert plan_swaps(placement, value_L, 10, 0.1) == [Swap(0, 0, 0, 2)]


def test_a_swap_has_to_be_worth_its_copy() -> None:
    placements = (Placement((0, -1)), Placement((0, -1)))
    value_L = [np.array([10.0, 12.9]), np.array([10.0, 13.1])]
    assert [swap.layer for swap in plan_swaps(placements, value_L, 9, 0.1, min_gain=2.0)] == [1]


def test_wrong_shapes_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="one value per expert"):
        place([np.ones(3)], [LayerSize(4, 1, 1)], 10)
    with pytest.raises(ValueError, match="at least 0"):
        place([np.array([np.nan])], [LayerSize(1, 1, 1)], 10)


# ---- how many swaps ----
@given(
    st.lists(st.floats(0, 3), min_size=6, max_size=6),
    st.integers(0, 6),
    st.integers(1, 20),
    st.floats(0.01, 5),
)
def test_swaps_read_a_share_of_what_the_host_reads(
    hits: list[float], num_slots: int, num_steps: int, share: float
) -> None:
    layers = [LayerSize(6, 10, 12), LayerSize(6, 25, 30)]
    value_L = [np.array(hits), np.array(hits[::-1])]
    placements = best_experts(value_L, [num_slots, num_slots])
    limit = swap_limit(placements, value_L, layers, num_steps, share)
    host_bytes = sum(
        layer.slot_bytes * (1 - np.exp(-value_E[e]))
        for placement, value_E, layer in zip(placements, value_L, layers, strict=True)
        for e in range(6)
        if placement.slot_of_expert_E[e] < 0
    )
    allowed_bytes = share * num_steps * host_bytes
    assert limit == 1 or limit * 30 <= allowed_bytes * (1 + 1e-9)
    assert (limit + 1) * 30 > allowed_bytes * (1 - 1e-9)


def test_best_experts_of_every_layer() -> None:
    values = [np.array([1.0, 3, 2]), np.zeros(4)]
    placements = best_experts(values, [2, 3])
    assert [p.slot_of_expert_E for p in placements] == [(-1, 0, 1), (0, 1, 2, -1)]


def test_a_budget_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="budget of at least 0 bytes, got -1"):
        place([np.ones(3)], [LayerSize(3, 10, 10)], -1)
