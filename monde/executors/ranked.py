"""The experts of one layer over ranks: sizes are exchanged once, a plan is made of them alike everywhere, rows move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from monde.core import RoutedBatch
from monde.executors.peers import PeersExecutor
from monde.executors.ranked_batch import RankedBatch, exchange_batch
from monde.executors.ranks import RankGroup
from monde.executors.rows import gather_rows
from monde.executors.sharded import ShardedExecutor
from monde.planning.sharding import BatchPlan, RankedCounts, Way


class RankedExecutor:
    """Both ways of one layer, or the one that this model's ranks hold weights for.

    first_expert_W1: rank w owns experts [w] to [w + 1], where peers are concerned.
    """

    def __init__(
        self,
        ranks: RankGroup,
        layer_idx: int,
        first_expert_W1: tuple[int, ...],
        plan: Callable[[RankedCounts], BatchPlan],
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

    def forward(self, batch: RoutedBatch) -> Tensor:
        """y_TD of this rank's tokens. All ranks call it, with any numbers of tokens. Errors: RankError."""
        if self.home_E1.device != batch.x_TD.device:
            self.home_E1 = self.home_E1.to(batch.x_TD.device)
        ranked = exchange_batch(self.ranks, self.layer_idx, batch, self.home_E1, self.num_experts)
        self.last_plan = plan = self.plan(ranked.counts)
        y_TD = self._compute(ranked, plan)
        if not ranked.is_divided:
            return y_TD
        return gather_rows(self.ranks, y_TD, ranked.counts.num_tokens_W).wait()

    def _compute(self, ranked: RankedBatch, plan: BatchPlan) -> Tensor:
        if plan.way is Way.PEERS:
            assert self.peers is not None
            return self.peers.forward(ranked)
        assert self.sharded is not None
        return self.sharded.forward(ranked, plan.num_chunks)
