"""Whole experts spread over ranks: tokens travel to the ranks of their experts and back. No token is dropped.

A token goes to a rank once, however many of its experts live there, and comes back as one weighted sum; how many rows
go where is what it is (uneven all-to-all). W ranks, T tokens of this rank, N rows that come in, K experts per token,
R rows that go out, D model dim, M routing words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monde.core import RoutedBatch
from monde.executors.ranked_batch import RankedBatch, unpack_routing
from monde.executors.ranks import RankGroup
from monde.executors.rows import swap_rows
from monde.executors.sharded import Compute


class PeersExecutor:
    """`compute` works on the layer's experts that live on this rank, ids from first_expert; it ignores all others."""

    def __init__(self, ranks: RankGroup, compute: Compute, first_expert: int) -> None:
        self.ranks, self.compute, self.first_expert = ranks, compute, first_expert

    def forward(self, batch: RankedBatch) -> Tensor:
        """y_TD of this rank's tokens, rounded once. All ranks call it. Errors: RankError."""
        ranks, x_TD = self.ranks, batch.mine.x_TD
        to_W = batch.counts.rows_WW[ranks.rank]
        from_W = tuple(rows_W[ranks.rank] for rows_W in batch.counts.rows_WW)
        goes_WT = (batch.home_TK[None] == torch.arange(ranks.size, device=x_TD.device)[:, None, None]).any(-1)
        token_R = goes_WT.nonzero()[:, 1]
        rows = swap_rows(ranks, x_TD[token_R], to_W, from_W, ranks.inward)
        words = swap_rows(ranks, batch.words_TM[token_R], to_W, from_W, ranks.inward)
        ids_NK, weights_NK = unpack_routing(words.wait())
        # Other ranks' experts get ids that no expert here has; the executors ignore those.
        local = RoutedBatch(rows.wait(), ids_NK - self.first_expert, weights_NK)
        partial_ND = self.compute(local, torch.float32)
        back_RD = swap_rows(ranks, partial_ND, from_W, to_W, ranks.outward).wait()
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        return y_TD.index_add_(0, token_R, back_RD).to(x_TD.dtype)
