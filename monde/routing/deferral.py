"""Expert deferral: which pairs of a decode step count one mixture-of-experts layer later (KTransformers, SOSP'25).

Of a token's K pairs those of smallest routing weight may wait: the host computes them while the GPU goes on with the
next layer's attention. Letters as in monde.core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monde.core import NOT_MINE, RoutedBatch


def check_topk(num_deferred: int, num_topk: int) -> None:
    """Errors: ValueError unless num_deferred < num_topk."""
    if num_deferred >= num_topk:
        raise ValueError(
            f"deferred_experts: expected 0..{num_topk - 1} in a layer that takes {num_topk} experts per token, "
            f"got {num_deferred}; load the model with fewer"
        )


def deferred_pairs_TK(topk_weights_TK: Tensor, num_deferred: int) -> Tensor:
    """bool [T, K]: the num_deferred pairs of smallest weight of every token, of equal ones those later in K.

    Weights alone decide. Deferring only what happens to be on the host would hide as much and spoil less, but then
    the answer would depend on who is resident.

    Errors: as check_topk.
    """
    num_topk = topk_weights_TK.shape[1]
    check_topk(num_deferred, num_topk)
    order_TK = topk_weights_TK.float().argsort(dim=-1, descending=True, stable=True)
    is_deferred_TK = torch.zeros_like(order_TK, dtype=torch.bool)
    return is_deferred_TK.scatter_(1, order_TK[:, num_topk - num_deferred :], True)


def apart(batch: RoutedBatch, num_deferred: int) -> RoutedBatch:
    """Every token twice, [2T]: first with the pairs that count now, then with those that count one layer later.

    One batch, so that an executor reads an expert once for both. Errors: as check_topk.
    """
    is_deferred_TK = deferred_pairs_TK(batch.topk_weights_TK, num_deferred)
    ids_TK = batch.topk_ids_TK
    ids_2TK = torch.cat(
        (ids_TK.masked_fill(is_deferred_TK, NOT_MINE), ids_TK.masked_fill(~is_deferred_TK, NOT_MINE))
    )
    return RoutedBatch(batch.x_TD.repeat(2, 1), ids_2TK, batch.topk_weights_TK.repeat(2, 1))
