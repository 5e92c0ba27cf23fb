"""Who holds what of the experts, and what a batch over ranks is predicted to take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monde.planning.fit import AlphaBeta
from monde.planning.profile import Overlap
from monde.planning.schedule import Resource, ScheduleBuilder
from monde.planning.sharding import (
    NUM_CHUNKS,
    RankedCost,
    RankedCounts,
    Way,
    assign_experts,
    cut_ffn,
    peers_s,
    pipeline_s,
    plan_batch,
    rank_imbalance,
    sharded_s,
    shared_machine_s,
)
from monde.planning.simulate import simulate

COST = RankedCost(
    gather=AlphaBeta(1e-4, 1e-9),
    swap=AlphaBeta(1e-4, 1e-9),
    sum=AlphaBeta(1e-4, 1e-9),
    expert=AlphaBeta(1e-3, 1e-5),
    alone=AlphaBeta(1e-3, 1e-5),
    machine_W=(0, 1, 2, 3),
    share_W=(0.25,) * 4,
    first_expert_W1=assign_experts(16, 4),
    d_model=512,
    act_bytes_per_value=4,
    computing=Overlap(),
)


def counts(pairs_E: list[int], num_topk: int = 1) -> RankedCounts:
    """Tokens spread evenly over 4 ranks, top-1 rows to the ranks of experts."""
    by_rank = np.add.reduceat(pairs_E, list(COST.first_expert_W1[:-1])).tolist()
    tokens = sum(pairs_E) // num_topk
    return RankedCounts(
        (tokens // 4,) * 4, tuple(tuple(n // 4 for n in by_rank) for _ in range(4)), tuple(pairs_E), num_topk
    )


@given(st.integers(1, 5000), st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_cuts_cover_f_and_keep_to_the_shares(d_ffn: int, shares: list[float]) -> None:
    if len(shares) > d_ffn:
        with pytest.raises(
            ValueError, match=r'cannot cut experts of F=\d+; use fewer ranks or parallel="peers"'
        ):
            cut_ffn(d_ffn, shares)
        return
    cuts = cut_ffn(d_ffn, shares)
    widths = np.diff(cuts)
    assert (cuts[0], cuts[-1]) == (0, d_ffn)
    assert (widths >= 1).all()
    wanted = np.asarray(shares) / sum(shares) * d_ffn
    if wanted.min() >= 32:
        assert all(cut % 16 == 0 for cut in cuts[:-1])
        assert (abs(widths - wanted) <= 16).all()
    elif wanted.min() >= 2:
        assert (abs(widths - wanted) <= 1 + 1e-6).all()


def test_shares_must_be_positive() -> None:
    with pytest.raises(ValueError, match="mesh_shares: expected numbers above 0"):
        cut_ffn(64, [1, 0])


@given(st.integers(1, 300), st.integers(1, 9))
def test_every_expert_has_one_owner(num_experts: int, num_ranks: int) -> None:
    firsts = assign_experts(num_experts, num_ranks)
    sizes = np.diff(firsts)
    assert (firsts[0], firsts[-1]) == (0, num_experts)
    assert sizes.max() - sizes.min() <= 1


@given(
    g=st.floats(1e-6, 1), x=st.floats(1e-6, 1), s=st.floats(1e-6, 1), num_chunks=st.sampled_from(NUM_CHUNKS)
)
def test_the_formula_bounds_the_simulated_pipeline(g: float, x: float, s: float, num_chunks: int) -> None:
    """Gathers and sums on one link, in the order in which the executor issues them: never more than the formula says,
    and less by one chunk's compute at most."""
    build, gathers, computes = ScheduleBuilder(), [], []
    gathers.append(build.add("gather", Resource.LINK_INTER, g))
    for c in range(num_chunks):
        if c + 1 < num_chunks:
            gathers.append(build.add("gather", Resource.LINK_INTER, g))
        computes.append(build.add("compute", Resource.HOST, x, after=[gathers[c]]))
        build.add("sum", Resource.LINK_INTER, s, after=[computes[c]])
    simulated_s = simulate(build.build()).makespan_s
    predicted_s = pipeline_s(g, x, s, num_chunks, Overlap())
    assert simulated_s * (1 - 1e-9) <= predicted_s <= simulated_s * (1 + 1e-9) + x


def test_balanced_large_experts_go_to_peers_and_skew_to_slices() -> None:
    """K = 1 < W: whole experts move fewer rows; but with every token on one expert, three ranks of four would idle."""
    even, skewed = counts([1000] * 16), counts([16000] + [0] * 15)
    assert rank_imbalance(even, COST) == pytest.approx(1)
    assert rank_imbalance(skewed, COST) == pytest.approx(4)
    assert plan_batch(even, COST).way is Way.PEERS
    assert plan_batch(skewed, COST).way is Way.SHARDED
    assert plan_batch(even, COST, [Way.SHARDED]).way is Way.SHARDED
    assert plan_batch(skewed, COST, [Way.PEERS]).way is Way.PEERS


def test_compute_of_slices_does_not_depend_on_the_skew() -> None:
    free = AlphaBeta(0, 0)
    cost = replace(COST, gather=free, sum=free, swap=free, expert=AlphaBeta(0, 1e-5))
    even, skewed = counts([1000] * 16), counts([16000] + [0] * 15)
    assert sharded_s(even, cost, 1) == pytest.approx(sharded_s(skewed, cost, 1)) == pytest.approx(0.04)
    assert peers_s(even, cost) == pytest.approx(0.04)
    assert peers_s(skewed, cost) == pytest.approx(0.16)


def test_unequal_slices_wait_for_the_widest() -> None:
    cost = replace(COST, share_W=(0.7, 0.1, 0.1, 0.1))
    load = counts([1000] * 16)
    assert sharded_s(load, cost, 1) - sharded_s(load, COST, 1) == pytest.approx(
        0.45 * 16 * (1e-3 + 1000 * 1e-5)
    )


def test_chunks_where_they_pay() -> None:
    """A slow link next to as much compute wants chunks; weights read anew by every chunk do not."""
    slow_link = replace(
        COST, gather=AlphaBeta(1e-4, 2e-8), sum=AlphaBeta(1e-4, 2e-8), expert=AlphaBeta(1e-5, 1e-4)
    )
    heavy_weights = replace(slow_link, expert=AlphaBeta(1.0, 1e-4))
    load = counts([1000] * 16)
    chosen = plan_batch(load, slow_link)
    assert chosen.num_chunks > 1
    assert chosen.sharded_s == min(sharded_s(load, slow_link, c) for c in NUM_CHUNKS)
    assert plan_batch(load, heavy_weights).num_chunks == 1
    assert plan_batch(counts([4] + [0] * 15), slow_link).num_chunks == 1


def test_nobody_has_a_token() -> None:
    nothing = RankedCounts((0,) * 4, ((0,) * 4,) * 4, (0,) * 16, 2)
    plan = plan_batch(nothing, COST)
    assert (plan.sharded_s, plan.peers_s, plan.rho) == (0, 0, 1)


def test_ranks_of_one_machine_share_what_the_early_ones_leave() -> None:
    """Alone a rank is twice as fast: 2 s of work beside 1 s ends after 1 + 0.5. On machines of their own, after 2."""
    assert shared_machine_s([2, 1], [1, 0.5]) == pytest.approx(1.5)
    assert shared_machine_s([2, 1], [2, 1]) == pytest.approx(2)
    assert shared_machine_s([2, 0, 0, 0], [1, 0, 0, 0]) == pytest.approx(1)
    # Four on two cores: two at once run as fast as one, so 4 s and 3 s beside nobody else take 2 and 1.5.
    assert shared_machine_s([4, 3, 0, 0], [2, 1.5, 0, 0]) == pytest.approx(2)
    assert shared_machine_s([0, 0], [0, 0]) == 0
    skewed = counts([16000] + [0] * 15)
    one_machine = replace(COST, machine_W=(0,) * 4, alone=AlphaBeta(2.5e-4, 2.5e-6))
    moved_s = peers_s(skewed, replace(COST, expert=AlphaBeta(0, 0), alone=AlphaBeta(0, 0)))
    assert peers_s(skewed, one_machine) - moved_s == pytest.approx((peers_s(skewed, COST) - moved_s) / 4)


def test_a_gain_within_the_margin_leaves_whole_experts_whole() -> None:
    load = counts([1000] * 16)
    free = AlphaBeta(0, 0)
    for skew, way in ((1.03, Way.PEERS), (1.08, Way.SHARDED)):
        first = round(1000 * skew)
        skewed = counts([first] * 4 + [1000] * 12)
        cost = replace(COST, gather=free, swap=free, sum=free)
        assert peers_s(skewed, cost) > peers_s(load, cost)
        assert plan_batch(skewed, cost).way is way


@given(
    pairs_E=st.lists(st.integers(0, 40), min_size=16, max_size=16),
    num_chunks=st.sampled_from(NUM_CHUNKS),
)
def test_reads_of_weights_by_chunks(pairs_E: list[int], num_chunks: int) -> None:
    """Expert by expert: weights are read in as many chunks as have pairs of it, at most one each."""
    free = AlphaBeta(0, 0)
    cost = replace(COST, gather=free, swap=free, sum=free)
    wanted_s = sum(0.25 * (1e-3 * min(p, num_chunks) + 1e-5 * p) for p in pairs_E)
    assert sharded_s(counts(pairs_E), cost, num_chunks) == pytest.approx(wanted_s)
