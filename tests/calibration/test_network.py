"""Measuring a mesh: the same profile on all ranks, one that plans, and slow-downs of pairs from when each ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monde.calibration.network import NetworkEffort, measure_network, overlap_of
from monde.device.mesh import open_mesh
from monde.planning.exchange import exchanges
from monde.planning.network_profile import NetworkProfile
from monde.training.dispatch import NodeExchange
from monde.training.turns import are_alike, may_be_soonest
from tests.distributed.ranks import run_ranks


def measured(shape: tuple[int, int]) -> NetworkProfile:
    mesh = open_mesh(*shape)
    profile = measure_network(mesh, NetworkEffort(num_samples=3, longest_s=0.005))
    NodeExchange(mesh, profile)  # refuses profiles that differ between ranks
    return profile


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_all_ranks_measure_the_same(shape: tuple[int, int], tmp_path: Path) -> None:
    profiles = run_ranks(measured, shape[0] * shape[1], tmp_path, shape, deadline_s=120.0)
    assert all(profile == profiles[0] for profile in profiles)
    profile = profiles[0]
    assert (profile.num_nodes, profile.ranks_per_node) == shape
    assert (profile.node_a2a.seconds(1e6) > 0) == (shape[0] > 1)
    assert (profile.local_gather.seconds(1e6) > 0) == (shape[1] > 1)
    assert len(profile.ways) == (12 if min(shape) > 1 else 0)
    profile.save(tmp_path / "network.json")
    assert NetworkProfile.load(tmp_path / "network.json") == profile
    assert all(e.seconds_s > 0 for e in exchanges(profile, 2e6, 1e6, adds=True))


@given(st.floats(1, 3), st.floats(1, 3), st.floats(0.01, 1), st.floats(0.01, 1))
def test_slow_downs_of_a_pair_are_found_again(first: float, second: float, a_s: float, b_s: float) -> None:
    """Both run slowed until one ends, then the other alone: from the two ends back to the two factors."""
    if 1 / first + 1 / second < 1:
        return
    if a_s * first <= b_s * second:
        ends = (a_s * first, a_s * first + b_s - a_s * first / second)
    else:
        ends = (b_s * second + a_s - b_s * second / first, b_s * second)
    found = overlap_of((a_s, b_s), ends)
    assert found.first == pytest.approx(first, rel=1e-6)
    assert found.second == pytest.approx(second, rel=1e-6)


@given(*[st.floats(0.001, 10)] * 4)
def test_whatever_was_timed_is_an_overlap(a_s: float, b_s: float, a_end_s: float, b_end_s: float) -> None:
    found = overlap_of((a_s, b_s), (a_end_s, b_end_s))
    assert min(found.first, found.second) >= 1


def test_a_pair_that_takes_turns_or_worse_gains_nothing() -> None:
    for ends in ((1.0, 2.0), (1.5, 3.0), (2.0, 2.5)):
        found = overlap_of((1.0, 1.0), ends)
        assert 1 / found.first + 1 / found.second == pytest.approx(1.0, abs=1e-6)


def test_what_may_be_the_soonest_is_timed_again() -> None:
    """Few or scattered samples keep a step in; many that agree leave it out."""
    assert may_be_soonest([[3.0, 3.1], [1.0, 1.1], [1.05, 1.2]]) == [1, 2]
    scattered = [1.2, 0.9, 1.6]
    assert may_be_soonest([scattered, [1.0, 1.01, 0.99]]) == [0, 1]
    assert may_be_soonest([[*scattered, 1.2] * 50, [1.0, 1.01, 0.99] * 50]) == [1]
    assert may_be_soonest([[2.0]]) == [0]


def test_what_does_not_matter_is_not_timed_on() -> None:
    assert are_alike([[1.0, 1.01, 0.99] * 5, [1.02, 1.03, 1.01] * 5])
    assert not are_alike([[1.0, 1.01, 0.99] * 5, [1.08, 1.09, 1.07] * 5])
    assert not are_alike([[1.0, 1.3, 0.7], [1.02, 1.03, 1.01]])
