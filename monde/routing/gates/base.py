"""What a gate of a layer in training says: which tokens every expert gets, and with what weight.

Letters: G groups, T tokens (of a group, or of all), E experts, K experts per token, D model dim, R routed pairs,
S slots = E * P, P slots of an expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pairs:
    """Routed pairs by expert, and by token within one. weight_R is float32 and differentiable."""

    token_R: Tensor
    expert_R: Tensor
    weight_R: Tensor
    num_tokens: int
    num_experts: int


@dataclass(frozen=True)
class Mixture:
    """Slots that are weighted sums of a group's tokens, and tokens that are weighted sums of slots' outputs.

    Slots lie expert by expert, P each. Both float32 and differentiable.
    """

    dispatch_GTS: Tensor
    combine_GTS: Tensor
    num_experts: int


@dataclass(frozen=True)
class Balance:
    """What one rank's tokens contribute to the load-balancing loss of the whole batch.

    assigned_E: pairs before any are dropped, int64. prob_E: sum over tokens of the router's probability,
    differentiable.
    """

    assigned_E: Tensor
    prob_E: Tensor

    def loss(self, total_assigned_E: Tensor, total_tokens: int) -> Tensor:
        """This rank's share of E * sum_e f_e * P_e; shares add up to the loss, which is 1 for uniform routing.

        f_e: share of all pairs, P_e: mean probability, both over the whole batch: however its tokens lie on
        ranks, loss and gradients are the same. Source: GShard (arXiv 2006.16668), Switch (arXiv 2101.03961);
        the whole batch in place of one device's tokens is ours.
        """
        share_E = total_assigned_E / total_assigned_E.sum().clamp(min=1)
        return (
            self.prob_E.numel() * (share_E.to(self.prob_E.dtype) * self.prob_E).sum() / max(total_tokens, 1)
        )


@dataclass(frozen=True)
class Routing:
    """balance is None for gates that need no loss to balance them."""

    choice: Pairs | Mixture
    balance: Balance | None = None


class Gate(nn.Module, ABC):
    """x_GTD -> Routing. Experts are counted over all ranks; scores are float32 whatever x is.

    A group is what a gate may compare tokens within: one sequence. So a batch routes the same however its
    sequences lie on ranks.
    """

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        if min(d_model, num_experts) < 1:
            raise ValueError(
                f"{type(self).__name__}: expected d_model and num_experts of at least 1, got {d_model}, {num_experts}"
            )
        self.d_model, self.num_experts = d_model, num_experts

    @abstractmethod
    def forward(self, x_GTD: Tensor) -> Routing: ...


def pairs_of(topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_experts: int) -> Pairs:
    """Pairs whose id is outside [0, E) are left out: dropped tokens, identity experts."""
    ids_R = topk_ids_TK.reshape(-1)
    order_R = torch.argsort(ids_R, stable=True)
    sorted_R = ids_R[order_R]
    order_R = order_R[(sorted_R >= 0) & (sorted_R < num_experts)]
    return Pairs(
        order_R // max(topk_ids_TK.shape[1], 1),
        ids_R[order_R],
        topk_weights_TK.reshape(-1).index_select(0, order_R).float(),
        topk_ids_TK.shape[0],
        num_experts,
    )


def matrix(*shape: int) -> nn.Parameter:
    """Weights of variance 1 / fan_in."""
    return nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)
