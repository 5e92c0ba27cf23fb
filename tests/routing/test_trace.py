"""Traces on disk and off, and policies replayed over them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monde.core import Placement
from monde.planning.budget import LayerSize
from monde.routing.heat import Heat, HeatTracker
from monde.routing.replay import DynamicSettings, Residency, replay
from monde.routing.trace import Trace, TraceRecorder, hit_rate

L, E, K = 4, 32, 4
LAYERS = [LayerSize(E, 10, 10)] * L


def synthetic_trace(num_steps: int, seed: int) -> Trace:
    """Decode steps of a text: each layer has popular experts, a topic that changes now and then, and memory.

    An expert is drawn from those of the last 16 tokens with probability 0.6, else from the topic's popularity, where
    a quarter of the experts holds about 0.58 of the pairs, as measured within one text on a trained model.
    """
    rng = np.random.default_rng(seed)
    steps = []
    popularity_LE = np.zeros((L, E))
    recent: list[list[int]] = [[] for _ in range(L)]
    for s in range(num_steps):
        if s % 256 == 0:
            popularity_LE = rng.dirichlet(np.full(E, 0.8), L)
        step = []
        for l in range(L):
            chosen: list[int] = []
            while len(chosen) < K:
                remembers = recent[l] and rng.random() < 0.6
                e = rng.choice(recent[l]) if remembers else rng.choice(E, p=popularity_LE[l])
                if e not in chosen:
                    chosen.append(int(e))
            recent[l] = (recent[l] + chosen)[-16 * K :]
            step.append(np.array([chosen], np.int16))
        steps.append(tuple(step))
    return Trace("synthetic", (E,) * L, tuple(steps))


@pytest.fixture(scope="module")
def trace() -> Trace:
    return synthetic_trace(768, 0)


def heat_of(trace: Trace) -> Heat:
    tracker = HeatTracker(trace.num_experts_L, half_life_steps=1e9)
    for step in trace.steps:
        tracker.step()
        for l, ids_TK in enumerate(step):
            tracker.update(l, ids_TK, np.ones(ids_TK.shape))
    return tracker.read(trace.model)


def test_moving_policies_find_more_than_fixed_ones(trace: Trace) -> None:
    """Heat is local: half of the experts on the device, and only policies that move follow the topic."""
    budget_bytes = L * E // 2 * 10
    heat = heat_of(synthetic_trace(256, seed=7))  # of another text
    rate = {p: replay(trace, p, LAYERS, budget_bytes, heat).hit_rate for p in Residency}
    assert 0.4 < rate[Residency.UNIFORM] < 0.6
    assert rate[Residency.STATIC] < 0.65
    assert rate[Residency.LRU] > 0.75
    assert rate[Residency.DYNAMIC] > 0.7


def test_the_dynamic_policy_moves_a_fraction_of_what_lru_moves(trace: Trace) -> None:
    budget_bytes = L * E // 4 * 10
    lru = replay(trace, Residency.LRU, LAYERS, budget_bytes)
    dynamic = replay(trace, Residency.DYNAMIC, LAYERS, budget_bytes)
    assert dynamic.num_swaps < lru.num_swaps / 5
    assert dynamic.hit_rate > lru.hit_rate - 0.05
    assert dynamic.swap_bytes == dynamic.num_swaps * 10


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=60), st.integers(0, 8))
def test_lru_is_an_lru_cache(ids: list[int], num_slots: int) -> None:
    """One pair a step: the replay against an ordered dictionary that starts with the first experts, oldest last."""
    steps = tuple((np.array([[e]], np.int16),) for e in ids)
    got = replay(Trace("", (8,), steps), Residency.LRU, [LayerSize(8, 1, 1)], num_slots)
    cache = OrderedDict((e, None) for e in range(num_slots))
    num_hits = num_misses = 0
    for e in ids:
        if e in cache:
            num_hits += 1
            cache.move_to_end(e)
        elif num_slots:
            num_misses += 1
            cache.popitem(last=False)
            cache[e] = None
    assert (got.num_hits, got.num_pairs, got.num_swaps) == (num_hits, len(ids), num_misses)


def test_more_budget_never_finds_less_with_known_heat(trace: Trace) -> None:
    heat = heat_of(trace)
    rates = [replay(trace, Residency.STATIC, LAYERS, b, heat).hit_rate for b in range(0, L * E * 10 + 1, 160)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, 1.0)


def test_swaps_are_bounded(trace: Trace) -> None:
    cautious = DynamicSettings(interval_steps=64, max_swaps=2)
    got = replay(trace, Residency.DYNAMIC, LAYERS, 320, settings=cautious)
    assert 0 < got.num_swaps <= 2 * 768 // 64


def test_chance_alone_moves_nobody() -> None:
    """Of experts that are equally popular the counts differ twofold at any time."""
    rng = np.random.default_rng(0)
    layers = [LayerSize(64, 10, 10)] * 4
    steps = tuple(tuple(rng.permutation(64)[None, :8].astype(np.int16) for _ in layers) for _ in range(300))
    equal = Trace("", (64,) * 4, steps)
    trusting = DynamicSettings(sees_chance=False, min_gain=0)
    assert replay(equal, Residency.DYNAMIC, layers, 640).num_swaps == 0
    assert replay(equal, Residency.DYNAMIC, layers, 640, settings=trusting).num_swaps > 500


def test_static_needs_heat_of_this_model(trace: Trace) -> None:
    with pytest.raises(ValueError, match="needs a heat file"):
        replay(trace, Residency.STATIC, LAYERS, 100)
    with pytest.raises(ValueError, match="record the heat of this model"):
        replay(trace, Residency.STATIC, LAYERS, 100, Heat("other", (np.zeros(3, np.float32),), 1.0))


def test_hit_rate_by_hand() -> None:
    ids = np.array([[0, 1], [2, -1]], np.int16)
    trace = Trace("", (3,), ((ids,), (ids[:0],)))
    assert hit_rate((Placement((0, -1, 1)),), trace) == pytest.approx(2 / 3)
    assert hit_rate((Placement((0, -1, 1)),), Trace("", (3,), ())) == 0


def test_a_recorder_keeps_what_counts() -> None:
    recorder = TraceRecorder((4, 2))
    recorder.step()
    ids_TK = torch.tensor([[0, 3], [4, -1]])
    recorder.record(0, ids_TK, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    ids_TK.zero_()
    trace = recorder.finish("m")
    np.testing.assert_array_equal(trace.steps[0][0], [[0, -1], [-1, -1]])
    assert trace.steps[0][1].size == 0
    assert trace.num_experts_L == (4, 2)


def test_a_record_may_begin_in_the_middle_of_a_step() -> None:
    recorder = TraceRecorder((4, 2))
    recorder.record(1, torch.tensor([[1]]), torch.ones(1, 1))
    [step] = recorder.finish().steps
    assert [layer.size for layer in step] == [0, 1]


def test_recording_never_reads_back() -> None:
    recorder = TraceRecorder((4,))
    recorder.step()
    recorder.record(0, torch.zeros(2, 2, dtype=torch.int64, device="meta"), torch.ones(2, 2, device="meta"))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=2), max_size=4)
)
def test_a_trace_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[tuple[int, int]]]
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    rng = np.random.default_rng(0)
    steps = tuple(tuple(rng.integers(-1, 9, s).astype(np.int16) for s in step) for step in shapes)
    Trace("m", (9, 9), steps).save(path)
    again = Trace.load(path)
    assert (again.model, again.num_experts_L, len(again.steps)) == ("m", (9, 9), len(steps))
    for a, b in zip(again.steps, steps, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a record of routing"):
        Trace.load(path)
    np.savez(path, x=np.zeros(1))
    with pytest.raises(ValueError, match="not a record of routing"):
        Trace.load(path)
    with pytest.raises(OSError, match="absent"):
        Trace.load(tmp_path / "absent")
