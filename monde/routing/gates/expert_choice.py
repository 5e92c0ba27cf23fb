"""The gate by which every expert chooses its tokens: balanced by construction, no loss, tokens may get none."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from monde.routing.gates.base import Gate, Pairs, Routing, matrix


class ExpertChoiceGate(Gate):
    """Each expert takes the ceil(top_k * T / E) tokens of a group that score highest, weighted by softmax over E.

    top_k: experts that a token gets on average. A token's experts depend on later tokens of its group.
    Source: arXiv 2202.09368.
    """

    def __init__(self, d_model: int, num_experts: int, *, top_k: float = 2.0) -> None:
        super().__init__(d_model, num_experts)
        if not 0 < top_k <= num_experts:
            raise ValueError(
                f"ExpertChoiceGate: expected top_k above 0, at most {num_experts} experts, got {top_k}"
            )
        self.top_k = top_k
        self.weight_ED = matrix(num_experts, d_model)

    def forward(self, x_GTD: Tensor) -> Routing:
        G, T, _ = x_GTD.shape
        num_chosen = min(T, math.ceil(self.top_k * T / self.num_experts))
        prob_GTE = F.linear(x_GTD.float(), self.weight_ED.float()).softmax(-1)
        weight_GCE, token_GCE = prob_GTE.topk(num_chosen, dim=1)
        token_GCE = token_GCE + T * torch.arange(G, device=x_GTD.device)[:, None, None]
        token_ER, weight_ER = (of_GCE.permute(2, 0, 1).flatten(1) for of_GCE in (token_GCE, weight_GCE))
        expert_ER = torch.arange(self.num_experts, device=x_GTD.device)[:, None].expand_as(token_ER)
        return Routing(
            Pairs(token_ER.flatten(), expert_ER.flatten(), weight_ER.flatten(), G * T, self.num_experts)
        )
