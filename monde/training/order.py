"""Order and its inverse: tokens to rows that lie expert by expert, and outputs back to tokens.

Letters: T tokens, E experts, R rows, D model dim, G groups, S slots = E * P.
Two orders with one answer: index picks rows, einsum multiplies with masks (GShard). Source: FSMoE (arXiv 2501.10714).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from monde.routing.gates import Mixture, Pairs


class Order(Protocol):
    @property
    def counts_E(self) -> Tensor:
        """Rows of every expert, int64."""
        ...

    def rows(self, x_TD: Tensor) -> Tensor:
        """rows_RD in x's type, expert by expert."""
        ...

    def restore(self, y_RD: Tensor) -> Tensor:
        """y_TD: outputs weighted and summed in float32 (or wider), in y's type."""
        ...


@dataclass(frozen=True)
class IndexOrder:
    """One row a pair."""

    pairs: Pairs

    @property
    def counts_E(self) -> Tensor:
        return torch.bincount(self.pairs.expert_R, minlength=self.pairs.num_experts)

    def rows(self, x_TD: Tensor) -> Tensor:
        return x_TD.index_select(0, self.pairs.token_R)

    def restore(self, y_RD: Tensor) -> Tensor:
        weighted_RD = y_RD * self.pairs.weight_R.to(_wide(y_RD))[:, None]
        sum_TD = weighted_RD.new_zeros(self.pairs.num_tokens, y_RD.shape[1])
        return sum_TD.index_add(0, self.pairs.token_R, weighted_RD).to(y_RD.dtype)


@dataclass(frozen=True)
class EinsumOrder:
    """One row a slot: slots no token is in are computed too, and count for nothing."""

    mixture: Mixture

    @classmethod
    def of_pairs(cls, pairs: Pairs) -> EinsumOrder:
        """Masks with as many slots an expert as the busiest one needs."""
        counts_E = torch.bincount(pairs.expert_R, minlength=pairs.num_experts)
        num_slots = int(counts_E.max()) if pairs.num_experts else 0
        first_E = counts_E.cumsum(0) - counts_E
        place_R = torch.arange(len(pairs.expert_R), device=counts_E.device) - first_E[pairs.expert_R]
        slot_R = pairs.expert_R * num_slots + place_R
        empty_TS = pairs.weight_R.new_zeros(pairs.num_tokens, pairs.num_experts * num_slots)
        where = (pairs.token_R, slot_R)
        dispatch_TS = empty_TS.index_put(where, torch.ones_like(pairs.weight_R))
        combine_TS = empty_TS.index_put(where, pairs.weight_R)
        return cls(Mixture(dispatch_TS[None], combine_TS[None], pairs.num_experts))

    @property
    def _shape(self) -> tuple[int, int, int]:
        """G, E, P."""
        G, _, S = self.mixture.dispatch_GTS.shape
        return G, self.mixture.num_experts, S // self.mixture.num_experts

    @property
    def counts_E(self) -> Tensor:
        G, E, P = self._shape
        return torch.full((E,), G * P, device=self.mixture.dispatch_GTS.device)

    def rows(self, x_TD: Tensor) -> Tensor:
        G, E, P = self._shape
        mask_GTS = self.mixture.dispatch_GTS
        x_GTD = x_TD.view(G, mask_GTS.shape[1], x_TD.shape[1]).to(mask_GTS.dtype)
        mixed_GSD = torch.einsum("gts,gtd->gsd", mask_GTS, x_GTD)
        return mixed_GSD.view(G, E, P, x_TD.shape[1]).transpose(0, 1).flatten(0, 2).to(x_TD.dtype)

    def restore(self, y_RD: Tensor) -> Tensor:
        G, E, P = self._shape
        y_GSD = y_RD.view(E, G, P, y_RD.shape[1]).transpose(0, 1).flatten(1, 2)
        mask_GTS = self.mixture.combine_GTS
        sum_GTD = torch.einsum("gts,gsd->gtd", mask_GTS, y_GSD.to(mask_GTS.dtype))
        return sum_GTD.flatten(0, 1).to(y_RD.dtype)


def order_of(choice: Pairs | Mixture, name: str | None) -> Order:
    """name None: index where tokens are picked, einsum where they are mixed."""
    if isinstance(choice, Mixture):
        return EinsumOrder(choice)
    return EinsumOrder.of_pairs(choice) if name == "einsum" else IndexOrder(choice)


def _wide(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)
