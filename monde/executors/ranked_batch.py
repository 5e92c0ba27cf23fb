"""One batch over ranks: what every rank must know of it, in one exchange.

W ranks, T tokens, E experts, K experts per token, D model dim, H words of a header.
A header is FIELDS, then rows for each rank W, then pairs of each expert E, then room for the routing of a small batch,
so that a decode step needs no exchange of its own for that. Everybody sees everybody's, so all decide alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from monde.core import RoutedBatch
from monde.executors.ranks import RankError, RankGroup
from monde.executors.rows import gather_rows
from monde.planning.sharding import ROUTING_WORDS, RankedCounts

FIELDS = ("layer", "tokens", "top-k", "model dim", "element type", "call", "last step", "digest", "digest")
_SAME = {
    "layer": 0,
    "top-k": 2,
    "model dim": 3,
    "element type": 4,
    "call of the model": 5,
}  # what ranks must agree on, and where it is
_TOKENS, _LAST_US, _DIGEST = 1, 6, [7, 8]
# From here on ranks with one and the same batch divide its tokens; fewer are bound by reading weights, and one more
# exchange would take longer than computing them on every rank.
DIVIDED_TOKENS = 32

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True)
class RankedBatch:
    """This rank's part of a batch; routing is packed as words_TM, M = 2 K: ids, then weights as fp32 bits.

    words_of_all, x_of_all: everybody's, rank by rank, where they are here already. is_divided: all ranks were asked
    for one batch, of which each has a part now; all of them want the whole answer.
    """

    mine: RoutedBatch
    counts: RankedCounts
    words_TM: Tensor
    home_TK: Tensor  # the rank of every pair's expert, W for pairs that compute nothing
    words_of_all: Tensor | None
    x_of_all: Tensor | None = None
    is_divided: bool = False
    last_us: int = 0  # what the layer's step before took, the slowest rank's

    def all_words(self, ranks: RankGroup) -> Tensor:
        """Everybody's routing, rank by rank, on the device of the batch."""
        if self.words_of_all is not None:
            return self.words_of_all
        return gather_rows(ranks, self.words_TM, self.counts.num_tokens_W).wait()


def unpack_routing(words_TM: Tensor) -> tuple[Tensor, Tensor]:
    """topk_ids_TK int64 and topk_weights_TK fp32."""
    num_topk = words_TM.shape[1] // 2
    return words_TM[:, :num_topk].long(), words_TM[:, num_topk:].contiguous().view(torch.float32)


def header_words(num_ranks: int, num_experts: int) -> int:
    """H of a layer."""
    return len(FIELDS) + num_ranks + num_experts + ROUTING_WORDS


def exchange_batch(
    ranks: RankGroup,
    layer_idx: int,
    batch: RoutedBatch,
    home_E1: Tensor,
    num_experts: int,
    last_us: int = 0,
) -> RankedBatch:
    """home_E1: the rank of every expert; one more entry, W, for ids that name none. last_us: of this rank.

    Errors: RankError on all ranks where they call different layers or with different kinds of batches.
    """
    x_TD, ids_TK = batch.x_TD.contiguous(), batch.topk_ids_TK
    weights_TK = batch.topk_weights_TK.float()
    valid_TK = (weights_TK != 0) & (ids_TK >= 0) & (ids_TK < num_experts)
    ids_TK = ids_TK.where(valid_TK, num_experts)
    words_TM = torch.cat((ids_TK.to(torch.int32), weights_TK.view(torch.int32)), dim=1)
    home_TK = home_E1[ids_TK]
    goes_TW = torch.zeros((len(x_TD), ranks.size + 1), dtype=torch.bool, device=x_TD.device)
    goes_TW.scatter_(1, home_TK, True)
    pairs_E = torch.bincount(ids_TK.flatten(), minlength=num_experts + 1)[:num_experts]
    counted = torch.cat((goes_TW.sum(dim=0)[: ranks.size], pairs_E)).int()
    counted = torch.cat((_digest(x_TD, words_TM), counted)).cpu()

    num_counts = len(FIELDS) + ranks.size + num_experts
    header_H = torch.zeros(header_words(ranks.size, num_experts), dtype=torch.int32)
    kind = (layer_idx, len(x_TD), ids_TK.shape[1], x_TD.shape[1], _DTYPES.index(x_TD.dtype))
    fields = (*kind, ranks.num_calls % 2**31, last_us)
    header_H[: len(fields)] = torch.tensor(fields)
    header_H[len(fields) : num_counts] = counted
    if words_TM.numel() <= ROUTING_WORDS:
        header_H[num_counts : num_counts + words_TM.numel()] = words_TM.flatten()
    header_WH = ranks.exchange(header_H)
    _check(ranks, header_WH[:, : len(FIELDS)])

    here = RoutedBatch(x_TD, ids_TK, weights_TK)
    slowest_us = int(header_WH[:, _LAST_US].max())
    if len(x_TD) >= DIVIDED_TOKENS and len(header_WH[:, [_TOKENS, *_DIGEST]].unique(dim=0)) == 1:
        whole = _divided(ranks, here, words_TM, home_TK, goes_TW, tuple(pairs_E.tolist()))
        return replace(whole, last_us=slowest_us)
    counts = RankedCounts(
        num_tokens_W=tuple(header_WH[:, _TOKENS].tolist()),
        rows_WW=tuple(map(tuple, header_WH[:, len(FIELDS) : len(FIELDS) + ranks.size].tolist())),
        pairs_E=tuple(header_WH[:, len(FIELDS) + ranks.size : num_counts].sum(dim=0).tolist()),
        num_topk=ids_TK.shape[1],
    )
    words_of_all = None
    if counts.routing_fits_header:
        parts = [
            words[num_counts : num_counts + num_tokens * words_TM.shape[1]]
            for words, num_tokens in zip(header_WH, counts.num_tokens_W, strict=True)
        ]
        words_of_all = torch.cat(parts).view(-1, words_TM.shape[1]).to(x_TD.device)
    return RankedBatch(here, counts, words_TM, home_TK, words_of_all, last_us=slowest_us)


def _divided(
    ranks: RankGroup,
    whole: RoutedBatch,
    words_TM: Tensor,
    home_TK: Tensor,
    goes_TW: Tensor,
    pairs_E: tuple[int, ...],
) -> RankedBatch:
    """This rank's part of a batch that all ranks have: sizes follow without asking."""
    bounds = [len(whole.x_TD) * w // ranks.size for w in range(ranks.size + 1)]
    rows_WW = torch.stack([goes_TW[start:end, : ranks.size].sum(dim=0) for start, end in pairwise(bounds)])
    counts = RankedCounts(
        num_tokens_W=tuple(end - start for start, end in pairwise(bounds)),
        rows_WW=tuple(map(tuple, rows_WW.tolist())),
        pairs_E=pairs_E,
        num_topk=home_TK.shape[1],
        is_everywhere=True,
    )
    part = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    mine = RoutedBatch(whole.x_TD[part], whole.topk_ids_TK[part], whole.topk_weights_TK[part])
    return RankedBatch(mine, counts, words_TM[part], home_TK[part], words_TM, whole.x_TD, is_divided=True)


def _digest(x_TD: Tensor, words_TM: Tensor) -> Tensor:
    """64 bits as two int32: the same batch has the same, another one hardly ever. 0 for batches that stay whole."""
    if len(x_TD) < DIVIDED_TOKENS:
        return torch.zeros(2, dtype=torch.int32, device=x_TD.device)
    place_M = torch.arange(1, words_TM.shape[1] + 1, device=x_TD.device) * 0x9E3779B1
    rows_T = x_TD.view(_BITS[x_TD.dtype]).sum(dim=1, dtype=torch.int64) + (words_TM * place_M).sum(dim=1)
    place_T = torch.arange(1, len(x_TD) + 1, device=x_TD.device) * 0x85EBCA77
    return (rows_T * (place_T | 1)).sum().view(1).view(torch.int32)


def _check(ranks: RankGroup, fields_WF: Tensor) -> None:
    for name, column in _SAME.items():
        values = fields_WF[:, column].tolist()
        if len(set(values)) > 1:
            ranks.look()  # a rank that failed in its call may have gone on to the next
            raise RankError(
                f"mesh: the ranks are in different calls, {name} by rank: {values}; every rank must call the same "
                "model equally often (generate does; a rank that has nothing to ask feeds one token)"
            )
