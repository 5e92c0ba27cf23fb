"""The experts of one layer over ranks: sizes are exchanged once, a plan is made of them alike everywhere, rows move."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from monde.core import RoutedBatch
from monde.executors.peers import PeersExecutor
from monde.executors.ranked_batch import RankedBatch, exchange_batch
from monde.executors.ranks import RankGroup
from monde.executors.rows import gather_rows
from monde.executors.sharded import ShardedExecutor
from monde.planning.sharding import BatchPlan, RankedCounts, Way, WayFactors
from monde.planning.sharding_feedback import StepFeedback


@dataclass(frozen=True)
class _Step:
    """A step that was done, and what this rank took for it after the exchange of sizes."""

    plan: BatchPlan
    factors: WayFactors
    num_tokens: int
    seconds_us: int


class RankedExecutor:
    """Both ways of one layer, or the one that this model's ranks hold weights for.

    first_expert_W1: rank w owns experts [w] to [w + 1], where peers are concerned. On CPUs steps are timed, and where
    there are both ways the times correct the plans; on GPUs a step's end is not waited for.
    """

    def __init__(
        self,
        ranks: RankGroup,
        layer_idx: int,
        first_expert_W1: tuple[int, ...],
        plan: Callable[[RankedCounts, WayFactors], BatchPlan],
        sharded: ShardedExecutor | None,
        peers: PeersExecutor | None,
    ) -> None:
        self.ranks, self.layer_idx, self.plan = ranks, layer_idx, plan
        self.sharded, self.peers = sharded, peers
        self.num_experts = first_expert_W1[-1]
        ids_E1 = torch.arange(self.num_experts + 1, device="cpu")  # a model may be loading on "meta"
        ends_W = torch.tensor(first_expert_W1[1:], device="cpu")
        self.home_E1 = torch.bucketize(ids_E1, ends_W, right=True)
        self.last_plan: BatchPlan | None = None
        self.feedback = StepFeedback()
        self._last: _Step | None = None

    def forward(self, batch: RoutedBatch) -> Tensor:
        """y_TD of this rank's tokens. All ranks call it, with any numbers of tokens. Errors: RankError."""
        if self.home_E1.device != batch.x_TD.device:
            self.home_E1 = self.home_E1.to(batch.x_TD.device)
        last, self._last = self._last, None  # a step that fails is not noted
        last_us = 0 if last is None else last.seconds_us
        ranked = exchange_batch(self.ranks, self.layer_idx, batch, self.home_E1, self.num_experts, last_us)
        start_s = time.perf_counter()
        if last is not None:
            self.feedback.note(last.plan, last.factors, last.num_tokens, ranked.last_us * 1e-6)
        num_tokens = sum(ranked.counts.num_tokens_W)
        factors = self.feedback.factors(num_tokens)
        self.last_plan = plan = self.plan(ranked.counts, factors)
        y_TD = self._compute(ranked, plan)
        if y_TD.is_cpu and self.sharded is not None and self.peers is not None:
            seconds_us = max(1, min(round((time.perf_counter() - start_s) * 1e6), 2**31 - 1))
            self._last = _Step(plan, factors, num_tokens, seconds_us)
        if not ranked.is_divided:
            return y_TD
        return gather_rows(self.ranks, y_TD, ranked.counts.num_tokens_W).wait()

    def _compute(self, ranked: RankedBatch, plan: BatchPlan) -> Tensor:
        if plan.way is Way.PEERS:
            assert self.peers is not None
            return self.peers.forward(ranked)
        assert self.sharded is not None
        return self.sharded.forward(ranked, plan.num_chunks)
