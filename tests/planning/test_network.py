"""Strategies for exchanging rows: closed forms, limits, brute force over small pipelines, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monde.planning.exchange import (
    CHUNKS,
    Strategy,
    chunk_s_from,
    combine_s,
    dispatch_s,
    exchange_s,
    exchanges,
)
from monde.planning.fit import AlphaBeta
from monde.planning.network import Experts, Traffic, candidate, choose
from monde.planning.network_profile import CLUSTERS, Cluster, NetworkProfile, WayTimes
from monde.planning.profile import Overlap

FREE = AlphaBeta(0.0, 0.0)
TRAFFIC = Traffic(tokens=8192, top_k=2, num_experts=16, row_bytes=8192)


def cluster(num_nodes: int = 2, num_local: int = 4, **changes: object) -> Cluster:
    """A 1 GB/s NIC a node, 100 GB/s within it, copies for free, latencies of 10 and 1 us."""
    links = {
        "nic": AlphaBeta(10e-6, 1e-9), "nics_per_node": 1, "intra": AlphaBeta(1e-6, 1e-11), "copy": FREE,
        "source": "test",
    } | changes  # fmt: skip
    return Cluster(num_nodes, num_local, **links)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_local", [2, 4, 8])
def test_a_slow_shared_link_is_worth_the_degree(num_local: int) -> None:
    """Bytes over the NIC alone would give N exactly; the gather of the last chunk is what is missing."""
    network = cluster(num_local=num_local).profile()
    redundant_s = dispatch_s(network, 1e9, Strategy.REDUNDANT, 1)
    best = exchanges(network, 2e9, 1e9, adds=False)[0]
    assert redundant_s == pytest.approx(10e-6 + num_local * 1.0)
    assert best.strategy is Strategy.PIPELINED
    assert 0.95 * num_local < redundant_s / best.seconds_s < num_local


def test_drop_and_gather_in_closed_form() -> None:
    network = cluster(num_nodes=3, copy=AlphaBeta(2e-6, 1e-11)).profile()
    away = 2e8
    over_nodes = 2 * 10e-6 + away / 4 * 4e-9
    gather = 3 * 1e-6 + away * 3 / 4 * 1e-11
    copies = 2 * 2e-6 + (away / 4 + away) * 1e-11
    assert dispatch_s(network, away, Strategy.DROP_GATHER, 1) == pytest.approx(over_nodes + gather + copies)


@given(st.sampled_from(CHUNKS), st.floats(1e4, 1e9), st.floats(1e-11, 1e-8), st.floats(1e-11, 1e-8))
def test_a_pipeline_without_conflict_is_the_textbook_one(
    n: int, size: float, inter: float, intra: float
) -> None:
    """A + (n-1) max(A, G) + G for chunks of equal seconds A over nodes and G within the node."""
    network = cluster(nic=AlphaBeta(1e-5, inter), intra=AlphaBeta(1e-6, intra)).profile()
    A = float(network.node_a2a.seconds(size / 4 / n))
    G = float(network.local_gather.seconds(size * 3 / 4 / n))
    textbook = A + (n - 1) * max(A, G) + G
    assert dispatch_s(network, size, Strategy.PIPELINED, n) == pytest.approx(textbook, rel=1e-9)


def test_links_that_exclude_each_other_leave_nothing_to_overlap() -> None:
    same = {"intra": AlphaBeta(0, 1e-9), "nic": AlphaBeta(0, 1e-9)}
    alone = cluster(**same).profile()
    shared = cluster(**same, conflict=Overlap(2.0, 2.0)).profile()
    dropped = dispatch_s(shared, 1e8, Strategy.DROP_GATHER, 1)
    assert dispatch_s(shared, 1e8, Strategy.PIPELINED, 8) == pytest.approx(dropped)
    assert dispatch_s(alone, 1e8, Strategy.PIPELINED, 8) < 0.7 * dropped


@given(st.floats(0, 1e-2), st.sampled_from(CHUNKS), st.floats(1e4, 1e8))
def test_what_a_chunk_costs_is_found_again(chunk_s: float, chunks: int, size: float) -> None:
    network = replace(cluster().profile(), chunk_s=chunk_s)
    measured_s = dispatch_s(network, size, Strategy.PIPELINED, chunks)
    found = replace(network, chunk_s=chunk_s_from(network, size, chunks, measured_s))
    assert dispatch_s(found, size, Strategy.PIPELINED, chunks) == pytest.approx(measured_s)


def test_measured_exchanges_correct_the_model_between_and_beyond_their_sizes() -> None:
    network = cluster().profile()
    way = Strategy.DROP_GATHER
    times = WayTimes(way, 1, False, (1e4, 1e6), (0.1, 0.3))
    corrected = replace(network, ways=(times,))
    for size, expected_s in ((1e4, 0.1), (505e3, 0.2), (1e6, 0.3)):
        assert exchange_s(corrected, size, size, False, way, 1) == pytest.approx(expected_s)
    beyond = dispatch_s(network, 1e8, way, 1) / dispatch_s(network, 1e6, way, 1)
    assert exchange_s(corrected, 1e8, 1e8, False, way, 1) == pytest.approx(0.3 * beyond)
    assert exchange_s(corrected, 1e5, 1e5, True, way, 1) == combine_s(network, 1e5, 1e5, way, 1)


def test_few_bytes_are_sent_plainly_and_many_in_more_chunks() -> None:
    network = cluster(intra=AlphaBeta(1e-4, 1e-10)).profile()
    best = [exchanges(network, 2 * size, size, adds=False)[0] for size in (1e3, 1e6, 1e7, 1e8, 1e9)]
    assert best[0].strategy is Strategy.REDUNDANT
    assert best[-1].strategy is Strategy.PIPELINED
    assert [e.chunks for e in best] == sorted(e.chunks for e in best)


@given(st.floats(1e3, 1e9), st.booleans())
def test_the_first_is_the_least(size: float, adds: bool) -> None:
    network = CLUSTERS["10gbe"].profile()
    found = exchanges(network, 2 * size, size, adds)
    assert len(found) == 2 + len(CHUNKS)
    for e in found:
        alone_s = dispatch_s(network, size, e.strategy, e.chunks)
        assert e.seconds_s == (combine_s(network, 2 * size, size, e.strategy, e.chunks) if adds else alone_s)
    assert found[0].seconds_s == min(e.seconds_s for e in found)


@pytest.mark.parametrize(("E", "K", "M"), [(4, 2, 2), (8, 2, 4), (6, 3, 3), (4, 4, 2), (8, 1, 2)])
def test_nodes_of_a_token_by_enumeration(E: int, K: int, M: int) -> None:
    sets = list(combinations(range(E), K))
    mean = sum(len({e * M // E for e in chosen}) for chosen in sets) / len(sets)
    assert Traffic(1, K, E, 1).node_bytes(M) == pytest.approx(mean)


def test_once_a_node_saves_what_it_says() -> None:
    network = cluster().profile()
    per_expert = candidate(network, TRAFFIC, Strategy.DROP_GATHER)
    once = candidate(network, TRAFFIC, Strategy.DROP_GATHER, once_per_node=True)
    assert once.inter_bytes / per_expert.inter_bytes == pytest.approx(
        TRAFFIC.node_bytes(2) / TRAFFIC.routed_bytes
    )
    assert once.layer_s < per_expert.layer_s


def test_skew_moves_the_choice_from_whole_experts_to_sharding() -> None:
    network = cluster(nic=AlphaBeta(1e-6, 1e-11), num_local=2).profile()
    traffic = Traffic(tokens=4096, top_k=2, num_experts=8, row_bytes=2048, expert_s=5e-3)
    even = choose(network, traffic)
    skewed = choose(network, Traffic(**{**vars(traffic), "rank_skew": 3.0, "node_skew": 1.5}))
    assert even.best.strategy is not Strategy.SHARDING
    assert skewed.best.strategy is Strategy.SHARDING


def test_hierarchical_wins_where_messages_cost_more_than_bytes() -> None:
    network = cluster(num_nodes=8, num_local=8).profile()
    few, many = (Traffic(t, 2, 64, 1024) for t in (64, 1 << 18))
    best = [choose(network, t, [Experts.WHOLE]).best.strategy for t in (few, many)]
    assert best == [Strategy.EP_HIERARCHICAL, Strategy.EP]


def test_a_choice_explains_itself() -> None:
    choice = choose(cluster().profile(), TRAFFIC, [Experts.CUT_IN_NODE])
    assert choice.best.name in choice.why
    assert "as fast as redundant" in choice.why
    assert "slow each other 4.00x" in choice.why
    assert [c.layer_s for c in choice.candidates] == sorted(c.layer_s for c in choice.candidates)


def test_whole_experts_need_a_rank_each() -> None:
    traffic = Traffic(tokens=64, top_k=1, num_experts=2, row_bytes=64)
    network = cluster().profile()
    assert {c.strategy for c in choose(network, traffic).candidates}.isdisjoint(
        {Strategy.EP, Strategy.EP_HIERARCHICAL}
    )
    with pytest.raises(ValueError, match="2 experts are too few for 2 nodes of 4 ranks"):
        choose(network, traffic, [Experts.WHOLE])


def test_one_node_needs_no_network() -> None:
    network = cluster(num_nodes=1).profile()
    assert choose(network, TRAFFIC, [Experts.CUT_IN_NODE]).best.inter_bytes == 0


def test_kept_in_a_file(tmp_path: Path) -> None:
    times = WayTimes("redundant", 1, True, (1.0, 2.0), (3.0, 4.0))
    network = replace(CLUSTERS["a800-4nic"].profile(), ways=(times,))
    network.save(tmp_path / "n.json")
    assert NetworkProfile.load(tmp_path / "n.json") == network
    for damaged in ("{}", '{"version": 0}', "[]", '{"version": 1, "num_nodes": 2}'):
        (tmp_path / "n.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"n\.json: .*measure it again"):
            NetworkProfile.load(tmp_path / "n.json")


def test_refused() -> None:
    with pytest.raises(ValueError, match="at least one node"):
        cluster(num_nodes=0)
    with pytest.raises(ValueError, match="2 or more chunks"):
        candidate(cluster().profile(), TRAFFIC, Strategy.PIPELINED)
    with pytest.raises(ValueError, match="one chunk"):
        candidate(cluster().profile(), TRAFFIC, Strategy.REDUNDANT, 2)
    with pytest.raises(ValueError, match="K of E"):
        Traffic(1, 3, 2, 1)
    with pytest.raises(ValueError, match="skew"):
        Traffic(1, 1, 2, 1, rank_skew=0.5)
