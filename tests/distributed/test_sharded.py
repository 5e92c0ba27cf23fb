"""Experts over ranks give the one-process answer, whatever is cut, however ragged the batches are."""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hostcompute import Activation, ActivationKind, DType, ExpertSpec
from monde.core import RoutedBatch
from monde.executors.peers import PeersExecutor
from monde.executors.ranked import RankedExecutor
from monde.executors.ranked_batch import DIVIDED_TOKENS
from monde.executors.ranks import RankGroup
from monde.executors.sharded import ShardedExecutor, chunks_of
from monde.planning.sharding import BatchPlan, RankedCounts, Way, WayFactors, assign_experts, cut_ffn
from tests.distributed.moe import Case, compute_of, expected, shares, slices
from tests.distributed.ranks import run_ranks
from tests.hostcompute.bounds import F64, assert_within


def random_cases(num_ranks: int, seed: int) -> list[Case]:
    """Every activation, gated and not, with and without biases, in every storage type, ragged and with empty ranks."""
    rng = np.random.default_rng(seed)
    cases = []
    for i, (kind, dtype) in enumerate(product(ActivationKind, DType)):
        spec = ExpertSpec(
            num_experts=int(rng.integers(1, 9)),
            d_model=int(rng.integers(4, 70)),
            d_ffn=int(rng.integers(num_ranks, 150)),
            dtype=dtype,
            gated=kind.needs_gate or bool(rng.integers(2)),
            activation=Activation(kind, limit=2.0),
            has_bias=bool(rng.integers(2)),
        )
        num_tokens_W = [int(n) for n in rng.integers(0, 40, num_ranks) * (rng.random(num_ranks) > 0.3)]
        cases.append(
            Case(
                spec,
                tuple(num_tokens_W),
                num_topk=int(rng.integers(1, 5)),
                x_dtype=("f32", "bf16", "f16")[i % 3],
                skew=float(rng.choice([0, 0.6, 1])),
                seed=seed + i,
                num_chunks=int(rng.choice([1, 2, 3, 8])),
            )
        )
    # Nobody has a token; one rank has many, so that routing does not fit the header.
    big = ExpertSpec(4, 32, 48, DType.F32)
    cases += [Case(big, (0,) * num_ranks, 2), Case(big, (700,) + (0,) * (num_ranks - 1), 3, num_chunks=4)]
    # All ranks ask for one batch: its tokens are divided, or there are too few for that.
    cases += [
        Case(big, (n,) * num_ranks, 2, x_dtype, num_chunks=2, same=True)
        for n, x_dtype in ((45, "bf16"), (7, "f32"))
    ]
    return cases


def answers(cases: list[Case], shares_W: tuple[float, ...]) -> list[tuple[F64, F64]]:
    """This rank's rows of every case: sharded, and by whole experts on peers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ranks = RankGroup(mesh, timeout_s=30)
    found = []
    for case in cases:
        experts = case.experts()
        home_W1 = assign_experts(case.spec.num_experts, ranks.size)
        own = slices(case.spec, cut_ffn(case.spec.d_ffn, shares_W))[ranks.rank]
        whole = shares(case.spec, home_W1)[ranks.rank]
        sharded = ShardedExecutor(ranks, compute_of(own, experts, case.backend))
        peers = PeersExecutor(ranks, compute_of(whole, experts, case.backend), home_W1[ranks.rank])
        batch, seen = case.batch(ranks.rank), []

        def plan(
            way: Way, counts: RankedCounts, _: WayFactors, case: Case = case, seen: Any = seen
        ) -> BatchPlan:
            seen.append(counts)
            return BatchPlan(way, case.num_chunks, 0, 0, 1)

        y_sharded, y_peers = (
            RankedExecutor(ranks, 0, home_W1, partial(plan, way), sharded, peers).forward(batch)
            for way in (Way.SHARDED, Way.PEERS)
        )
        is_divided = case.same and case.num_tokens_W[0] >= DIVIDED_TOKENS
        assert [counts.is_everywhere for counts in seen] == [is_divided] * 2
        assert is_divided or seen[0].num_tokens_W == case.num_tokens_W
        assert y_sharded.dtype == y_peers.dtype == batch.x_TD.dtype
        found.append((y_sharded.double().numpy(), y_peers.double().numpy()))
    return found


@pytest.mark.parametrize(
    ("shares_W", "seed"), [((1, 1), 1), ((3, 1), 2), ((1, 1, 1, 1), 3), ((1, 5, 2, 2), 4)]
)
def test_same_answer_as_one_process(tmp_path: Path, shares_W: tuple[float, ...], seed: int) -> None:
    cases = random_cases(len(shares_W), seed)
    by_rank = run_ranks(answers, len(shares_W), tmp_path, cases, shares_W)
    for i, case in enumerate(cases):
        cut = slices(case.spec, cut_ffn(case.spec.d_ffn, shares_W))
        owned = shares(case.spec, assign_experts(case.spec.num_experts, len(shares_W)))
        for rank, found in enumerate(by_rank):
            y_sharded, y_peers = found[i]
            assert_within(y_sharded, expected(case, cut, rank), f"sharded, rank {rank}, {case}")
            assert_within(y_peers, expected(case, owned, rank), f"peers, rank {rank}, {case}")


def noted() -> list[WayFactors]:
    """What this rank has learnt after every step, where the ranks take unequally long and both ways are gone."""
    ranks = RankGroup(init_device_mesh("cpu", (dist.get_world_size(),)), timeout_s=30)
    case = Case(ExpertSpec(4, 16, 32, DType.F32), (5, 9), 2)
    home_W1 = assign_experts(4, ranks.size)
    experts, batch = case.experts(), case.batch(ranks.rank)
    sharded = ShardedExecutor(
        ranks, compute_of(slices(case.spec, (0, 16, 32))[ranks.rank], experts, "reference")
    )
    whole = compute_of(shares(case.spec, home_W1)[ranks.rank], experts, "reference")

    def late(batch: RoutedBatch, out_dtype: torch.dtype) -> torch.Tensor:
        time.sleep(0.03 * ranks.rank)
        return whole(batch, out_dtype)

    peers = PeersExecutor(ranks, late, home_W1[ranks.rank])
    ways = iter([Way.PEERS, Way.SHARDED, Way.PEERS, Way.SHARDED])
    executor = RankedExecutor(
        ranks, 0, home_W1, lambda counts, factors: BatchPlan(next(ways), 1, 0.02, 0.02, 1), sharded, peers
    )
    found = []
    for _ in range(4):
        executor.forward(batch)
        found.append(executor.feedback.factors(14))
    return found


def test_ranks_learn_the_slowest_ranks_seconds_alike(tmp_path: Path) -> None:
    first, second = run_ranks(noted, 2, tmp_path)
    assert first == second
    assert first[0] == WayFactors()  # known with the sizes of the next step
    assert all(factors.peers >= 1.5 for factors in first[1:])


def test_the_bound_catches_a_bias_added_on_every_rank() -> None:
    case = Case(ExpertSpec(2, 16, 24, DType.F32, has_bias=True), (5, 5), 2)
    want = expected(case, slices(case.spec, (0, 12, 24)), 0)
    twice_TD = want.value + case.experts()[0]["down_bias"].double().numpy()
    with pytest.raises(AssertionError, match="times the bound"):
        assert_within(twice_TD, want, "planted")


def test_chunks_cover_every_token_once() -> None:
    for num_tokens_W in [(7, 0, 3), (0, 0), (1, 1), (5, 40)]:
        for num_chunks in (1, 2, 3, 16):
            chunks = list(chunks_of(num_tokens_W, num_chunks))
            for rank, num_tokens in enumerate(num_tokens_W):
                covered = [t for chunk in chunks for t in range(chunk.start_W[rank], chunk.end_W[rank])]
                assert covered == list(range(num_tokens))
            assert all(sum(chunk.counts_W) > 0 for chunk in chunks)
