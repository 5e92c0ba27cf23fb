"""The cost model against arithmetic done by hand and against a clock that ticks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monde.planning.cost import CostModel, ExpertShape, overlapped_s
from monde.planning.machines import DESCRIBED
from monde.planning.profile import Curve, ExpertRate, Overlap
from monde.planning.split import Load, best_split

QWEN3 = ExpertShape(2048, 768)
H200 = CostModel(DESCRIBED["h200"], QWEN3)
overlaps = st.tuples(st.floats(1, 2), st.floats(1, 2)).map(lambda f: Overlap(*f))
work_s = st.floats(0, 10)


def ticking_clock_s(a_s: float, b_s: float, overlap: Overlap) -> float:
    """Both activities advance by event: an independent account of the same physics."""
    clock_s = 0.0
    while a_s > 0 and b_s > 0:
        step_s = min(a_s * overlap.first, b_s * overlap.second)
        clock_s += step_s
        a_s -= step_s / overlap.first
        b_s -= step_s / overlap.second
        a_s, b_s = (0.0 if left < 1e-12 else left for left in (a_s, b_s))
    return clock_s + a_s + b_s


@given(work_s, work_s, overlaps)
def test_overlap_is_what_a_clock_shows(a_s: float, b_s: float, overlap: Overlap) -> None:
    assert overlapped_s(a_s, b_s, overlap) == pytest.approx(ticking_clock_s(a_s, b_s, overlap), abs=1e-9)


@given(work_s, work_s, work_s, overlaps)
def test_more_work_never_ends_sooner(a_s: float, b_s: float, more_s: float, overlap: Overlap) -> None:
    assert overlapped_s(a_s + more_s, b_s, overlap) >= overlapped_s(a_s, b_s, overlap) - 1e-12
    assert overlapped_s(a_s, b_s + more_s, overlap) >= overlapped_s(a_s, b_s, overlap) - 1e-12
    assert max(a_s, b_s) - 1e-9 <= overlapped_s(a_s, b_s, overlap) <= a_s + b_s + 1e-9


def test_figures_of_the_measured_machine() -> None:
    """One bf16 expert of 2048x768: 9.4 MB, 171 us over PCIe, 63-90 us to read on the host."""
    assert QWEN3.expert_bytes == 3 * 2048 * 768 * 2
    assert 170e-6 < H200.copy_s() < 185e-6
    assert 63e-6 < H200.host_s(1) < 90e-6
    # fetching overtakes the host only at about 150 tokens
    assert H200.host_s(64) < H200.fetched_s(64)
    assert H200.host_s(300) > H200.fetched_s(300)


@pytest.mark.parametrize("name", DESCRIBED)
def test_costs_are_ordered(name: str) -> None:
    cost = CostModel(DESCRIBED[name], QWEN3)
    t_E = np.array([0, 1, 3, 8, 100, 1000])
    for seconds in (cost.host_s(t_E), cost.resident_s(t_E), cost.fetched_s(t_E), cost.zero_copy_s(t_E)):
        assert seconds.shape == t_E.shape
        assert seconds[0] == 0
        assert (np.diff(seconds[1:]) >= 0).all()
    assert (cost.resident_s(t_E) <= cost.zero_copy_s(t_E)).all()
    assert (cost.resident_s(t_E) <= cost.fetched_s(t_E)).all()


@given(st.integers(1, 2000), st.floats(0, 1))
def test_a_cut_lies_between_its_ends(tokens: int, share: float) -> None:
    assert H200.cut_s(tokens, 0.0) == pytest.approx(H200.host_s(tokens))
    assert H200.cut_s(tokens, 1.0) == pytest.approx(H200.fetched_s(tokens))
    assert H200.cut_s(tokens, share) >= max(H200.copy_s(share), H200.host_s(tokens, 1 - share)) - 1e-12
    assert H200.cut_s(0, share) == 0


def test_a_cut_expert_beats_both_whole_ones() -> None:
    """What whole experts cannot do: a third of F over the bus while the host computes two thirds."""
    mixtral = CostModel(DESCRIBED["h200"], ExpertShape(4096, 14336))
    whole = min(mixtral.host_s(1), mixtral.fetched_s(1))
    assert min(mixtral.cut_s(1, np.linspace(0, 1, 33))) < 0.95 * whole


def test_four_bits_read_less() -> None:
    int4 = CostModel(DESCRIBED["h200"], ExpertShape(2048, 768, weight_bits=4.5))
    assert int4.host_s(1) < 0.35 * H200.host_s(1)
    assert int4.resident_s(4096) == H200.resident_s(4096)


def test_a_format_that_was_timed_has_its_own_rate() -> None:
    slow = ExpertRate(0.0, 1e9, Curve((1,), (1e9,)))
    profile = dataclasses.replace(DESCRIBED["h200"], host_formats={"fp32": slow})
    in_fp32 = CostModel(profile, ExpertShape(2048, 768, weight_bits=32, weight_format="fp32"))
    in_fp16 = CostModel(profile, ExpertShape(2048, 768, weight_format="fp16"))
    assert in_fp32.host_s(1) == pytest.approx(4 * QWEN3.num_weights / 1e9)
    assert in_fp16.host_s(1) == H200.host_s(1)
    load = Load(np.array([3, 40]), np.zeros(2, bool), 40, 32)
    assert best_split(load, in_fp32).host_s == 0  # a host so slow gets nothing
    twice = profile.with_host(lambda rate: ExpertRate(0.0, rate.bytes_per_s * 2, rate.flops_per_s))
    assert CostModel(twice, in_fp32.shape).host.bytes_per_s == 2e9


def test_without_gpu_only_the_host_has_a_cost() -> None:
    cost = CostModel(dataclasses.replace(DESCRIBED["h200"], gpu=None), QWEN3)
    assert cost.host_s(1) == H200.host_s(1)
    with pytest.raises(ValueError, match="has no GPU"):
        cost.resident_s(1)
