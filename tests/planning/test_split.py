"""The split against every assignment there is, and against the policies of others.

n cold experts with tokens; masks_Mn: all 2^n choices of whom to fetch.
"""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from monde.planning.cost import CostModel, ExpertShape, overlapped_s
from monde.planning.fit import AlphaBeta
from monde.planning.machines import DESCRIBED
from monde.planning.profile import Curve, ExpertRate, GpuProfile, Overlap, PromptLaunches
from monde.planning.split import ExpertSplit, Lanes, Load, Where, best_split
from monde.planning.split_policies import SPLIT_POLICIES, fiddler, two_ended

SHAPE = ExpertShape(16, 32)
FAST_GPU = ExpertRate(0.0, 1e30, Curve((1,), (1e30,)))


@st.composite
def costs(draw: st.DrawFn, gpu_expert: ExpertRate | None = None) -> CostModel:
    """Any machine: rates over four decades, tables that fall as well as rise."""
    rate = st.floats(1e3, 1e7)
    flops = st.lists(rate, min_size=3, max_size=3).map(lambda y: Curve((1, 4, 16), tuple(y)))
    experts = st.builds(ExpertRate, st.sampled_from([0.0, 1e-4, 0.1]), rate, flops)
    overlap = st.builds(Overlap, st.floats(1, 2), st.floats(1, 2))
    link = st.builds(AlphaBeta, st.sampled_from([0.0, 1e-3]), st.floats(1e-7, 1e-3))
    gpu = GpuProfile(
        memory_bytes=0,
        expert=gpu_expert or draw(experts),
        h2d=draw(link),
        d2h=draw(link),
        zero_copy_bytes_per_s=draw(rate),
        round_trip=draw(link),
        host_while_copying=draw(overlap),
        gpu_while_copying=draw(overlap),
        block_overhead_s=0.0,
        decode_layer_s=0.0,
        prompt=PromptLaunches(0.0, *(draw(st.sampled_from([0.0, 1e-3, 0.1])) for _ in range(3)), 0.0),
    )
    profile = dataclasses.replace(DESCRIBED["h200"], host_expert=draw(experts), gpu=gpu)
    return CostModel(profile, SHAPE)


@st.composite
def loads(draw: st.DrawFn, max_experts: int = 10) -> Load:
    n = draw(st.integers(1, max_experts))
    tokens = draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))
    resident = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    granule = draw(st.sampled_from([None, 8, 12, 32]))
    busy_s = draw(st.sampled_from([0.0, 0.0, 0.01, 1.0]))
    begun = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=n, max_size=n)))
    begun_E = None if begun is None else np.array(begun) & (np.array(tokens) > 0) & ~np.array(resident)
    return Load(np.array(tokens), np.array(resident), max(sum(tokens), 1), granule, busy_s, begun_E)


def brute_force_s(load: Load, cost: CostModel, prefixes_only: bool = False) -> float:
    """The least makespan over all sets of fetched experts and all single cuts, from the costs' definition."""
    begun_E = np.zeros(len(load.tokens_E), bool) if load.begun_E is None else load.begun_E
    cold = np.flatnonzero((load.tokens_E > 0) & ~load.resident_E & ~begun_E)
    begun_s, num_begun = cost.host_s(load.tokens_E[begun_E]).sum(), begun_E.sum()
    tokens_n = load.tokens_E[cold]
    host_n, gemm_n = cost.host_s(tokens_n), cost.resident_s(tokens_n)
    n = len(cold)
    masks_Mn = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1
    if prefixes_only:
        slowest_first = sorted(range(n), key=lambda i: (-host_n[i], -tokens_n[i]))
        masks_Mn = np.zeros((n + 1, n), bool)
        for k in range(n + 1):
            masks_Mn[k, slowest_first[:k]] = True
    resident_s = cost.resident_s(load.tokens_E[load.resident_E]).sum()
    trip_s = (cost.round_trip_s if num_begun else cost.prompt_trip_s)(load.num_tokens)
    rows = range(load.cut_granule, SHAPE.d_ffn, load.cut_granule) if load.cut_granule else range(0)
    best_s = np.inf
    for cut, cut_rows in [(None, 0), *((c, r) for c in range(n) for r in rows)]:
        fetched_Mn = masks_Mn if cut is None else masks_Mn[~masks_Mn[:, cut]]
        if cut is not None and prefixes_only:
            fetched_Mn = masks_Mn[slowest_first.index(cut)][None]
        share = cut_rows / SHAPE.d_ffn
        copy_M = load.bus_busy_s + fetched_Mn.sum(1) * cost.copy_s()
        gemm_M = resident_s + fetched_Mn @ gemm_n
        host_M = (
            (~fetched_Mn) @ host_n + np.where(fetched_Mn.all(1) & (num_begun == 0), 0.0, trip_s) + begun_s
        )
        if cut is not None:
            copy_M = copy_M + cost.copy_s(share)
            gemm_M = gemm_M + cost.resident_s(tokens_n[cut], share)
            host_M = host_M - host_n[cut] + cost.host_s(tokens_n[cut], 1 - share)
        reading_s = (len(host_n) + num_begun) * cost.shape.expert_bytes / cost.host.bytes_per_s
        host_s = trip_s + begun_s + host_n.sum()
        overlap = cost.gpu.host_while_copying.of_share(min(1.0, reading_s / host_s))
        prompt = cost.gpu.prompt
        lead_M = prompt.fetch_s * (fetched_Mn.any(1) | (cut is not None))
        launch_M, copy_M = prompt.layer_s + lead_M, lead_M + copy_M
        makespan_M = np.maximum(
            overlapped_s(host_M, copy_M, overlap),
            overlapped_s(gemm_M, copy_M, cost.gpu.gpu_while_copying),
        )
        makespan_M = np.maximum(makespan_M, launch_M + gemm_M)
        best_s = min(best_s, makespan_M.min())
    return float(best_s)


@settings(max_examples=300, deadline=None)
@given(loads(), costs(gpu_expert=FAST_GPU))
def test_no_assignment_is_better(load: Load, cost: CostModel) -> None:
    assert best_split(load, cost).makespan_s == pytest.approx(brute_force_s(load, cost), rel=1e-9, abs=1e-15)


@settings(max_examples=200, deadline=None)
@given(loads(), costs())
def test_no_prefix_is_better_when_the_gpu_is_the_bottleneck(load: Load, cost: CostModel) -> None:
    expected_s = brute_force_s(load, cost, prefixes_only=True)
    assert best_split(load, cost).makespan_s == pytest.approx(expected_s, rel=1e-9, abs=1e-15)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(loads(), costs())
def test_a_gpu_bound_split_is_within_one_expert_of_any_assignment(load: Load, cost: CostModel) -> None:
    """Where more tokens favour the GPU: one expert's host seconds, two where experts may be cut (planning.split)."""
    lanes = Lanes(load, cost)
    assume(len(lanes.order) > 1)
    assume((np.diff(lanes.gemm_n) <= 0).all() and (np.diff(lanes.host_n / lanes.gemm_n) <= 1e-12).all())
    slack_s = float(lanes.host_n.max()) * (2 if load.cut_granule else 1)
    least_s = brute_force_s(load, cost)
    assert best_split(load, cost).makespan_s <= (least_s + slack_s) * (1 + 1e-9)


def test_most_machines_favour_the_gpu_as_tokens_grow() -> None:
    """What the bound asks of a machine, to a third: measured curves wiggle, and AMX fills its tiles before a GPU does."""
    tokens = np.arange(1, 4097)
    for profile in DESCRIBED.values():
        for shape in (ExpertShape(2048, 768), ExpertShape(4096, 14336), ExpertShape(1024, 4096, gated=False)):
            cost = CostModel(profile, shape)
            ratio = cost.host_s(tokens) / cost.resident_s(tokens)
            assert (ratio >= np.maximum.accumulate(ratio) * 0.64).all(), profile.machine.name


@settings(max_examples=200, deadline=None)
@given(loads(), costs(), st.sampled_from(sorted(SPLIT_POLICIES)))
def test_every_policy_covers_every_expert_once(load: Load, cost: CostModel, policy: str) -> None:
    split = SPLIT_POLICIES[policy](load, cost)
    idle_E, resident_E = load.tokens_E == 0, load.resident_E
    assert ((split.where_E == Where.IDLE) == idle_E).all()
    assert ((split.where_E == Where.RESIDENT) == (resident_E & ~idle_E)).all()
    if split.cut_expert is None:
        assert split.cut_rows == 0
    else:
        assert split.where_E[split.cut_expert] == Where.HOST
        assert load.cut_granule
        assert 0 < split.cut_rows < SHAPE.d_ffn
        assert split.cut_rows % load.cut_granule == 0
    for lane_s in (split.copy_s, split.gemm_s, split.host_s):
        assert -1e-12 <= lane_s <= split.makespan_s + 1e-9


@settings(max_examples=200, deadline=None)
@given(loads(), costs(gpu_expert=FAST_GPU), st.sampled_from(sorted(SPLIT_POLICIES)))
def test_no_policy_beats_the_best(load: Load, cost: CostModel, policy: str) -> None:
    best_s = best_split(load, cost).makespan_s
    assert best_s <= SPLIT_POLICIES[policy](load, cost).makespan_s * (1 + 1e-9) + 1e-12


@given(loads(), costs())
def test_two_ended_queue_is_the_loop_it_stands_for(load: Load, cost: CostModel) -> None:
    load = dataclasses.replace(load, begun_E=None)  # before there is a plan, only ours begins
    cold = [e for e in range(len(load.tokens_E)) if load.tokens_E[e] > 0 and not load.resident_E[e]]
    cold.sort(key=lambda e: (-cost.host_s(load.tokens_E[e]), -load.tokens_E[e]))
    gpu_free_s = float(cost.resident_s(load.tokens_E[load.resident_E]).sum())
    host_free_s = cost.prompt_trip_s(load.num_tokens)
    num_fetched = 0
    while cold:
        heaviest, lightest = load.tokens_E[cold[0]], load.tokens_E[cold[-1]]
        gpu_end_s = gpu_free_s + max(float(cost.copy_s()), float(cost.resident_s(heaviest)))
        host_end_s = host_free_s + float(cost.host_s(lightest))
        assume(abs(gpu_end_s - host_end_s) > 1e-12)  # rounding decides ties
        if gpu_end_s < host_end_s:
            gpu_free_s, cold = gpu_end_s, cold[1:]
            num_fetched += 1
        else:
            host_free_s, cold = host_end_s, cold[:-1]
    assert two_ended(load, cost).num_fetched == num_fetched


def test_fiddler_ignores_that_the_bus_is_busy() -> None:
    """Where it is a little quicker to fetch, Fiddler fetches all and the host idles."""
    cost = CostModel(DESCRIBED["h200"], ExpertShape(2048, 768))
    load = Load(np.full(64, 104), np.zeros(64, bool), 832, 64)
    assert fiddler(load, cost).num_fetched == 64
    assert best_split(load, cost).makespan_s < 0.8 * fiddler(load, cost).makespan_s


def test_nothing_is_fetched_or_cut_for_less_than_its_launch_takes() -> None:
    described = DESCRIBED["h200"]
    assert described.gpu is not None
    load = Load(np.array([90, 30, 9]), np.zeros(3, bool), 90, 64)
    for fetch_s, is_worth_it in ((0.0, True), (1e-3, False)):
        gpu = dataclasses.replace(described.gpu, prompt=PromptLaunches(0.0, 0.0, 0.0, fetch_s, 0.0))
        cost = CostModel(dataclasses.replace(described, gpu=gpu), ExpertShape(2048, 768))
        split = best_split(load, cost)
        assert (split.copy_s > 0) == is_worth_it
        assert split.lead_s == split.launch_s == (fetch_s if is_worth_it else 0.0)


def test_one_large_expert_is_cut() -> None:
    cost = CostModel(DESCRIBED["h200"], ExpertShape(4096, 14336))
    load = Load(np.array([1]), np.array([False]), 1, 64)
    cut = best_split(load, cost)
    assert cut.cut_expert == 0
    assert 0.2 < cut.cut_rows / 14336 < 0.5
    assert cut.makespan_s < 0.95 * best_split(dataclasses.replace(load, cut_granule=None), cost).makespan_s


def zipf_load(num_experts: int) -> Load:
    rng = np.random.default_rng(num_experts)
    popularity_E = 1 / np.arange(1, num_experts + 1)
    tokens_E = rng.multinomial(8 * 2048, rng.permutation(popularity_E / popularity_E.sum()))
    return Load(tokens_E, rng.random(num_experts) < 0.2, 2048, 64)


def python_calls(load: Load, cost: CostModel) -> int:
    """Function calls, of Python and C, that one split makes."""
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        best_split(load, cost)
    finally:
        sys.setprofile(None)
    return calls


def test_the_number_of_array_operations_does_not_depend_on_the_experts() -> None:
    cost = CostModel(DESCRIBED["h200"], ExpertShape(2048, 768))
    few, many = python_calls(zipf_load(64), cost), python_calls(zipf_load(4096), cost)
    assert many <= few * 1.1


def test_bad_loads_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        Load(np.zeros(3, int), np.zeros(4, bool), 1)
    with pytest.raises(ValueError, match="cut_granule"):
        Load(np.zeros(3, int), np.zeros(3, bool), 1, 0)


def test_nothing_to_do() -> None:
    cost = CostModel(DESCRIBED["h200"], SHAPE)
    split: ExpertSplit = best_split(Load(np.zeros(4, int), np.zeros(4, bool), 1, 8), cost)
    expected: NDArray[np.int8] = np.full(4, Where.IDLE, np.int8)
    assert (split.where_E == expected).all()
    assert split.makespan_s == split.launch_s == cost.gpu.prompt.layer_s
