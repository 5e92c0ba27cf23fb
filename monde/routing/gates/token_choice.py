"""Gates by which every token chooses its K experts: gshard, sigmoid, xmoe."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monde.routing.gates.base import Balance, Gate, Routing, matrix, pairs_of

DROPPED = -1  # the expert id of a pair beyond its expert's capacity


@dataclass(frozen=True)
class Scores:
    """The picks and their weights, float32; prob_TE None: no balancing loss."""

    topk_ids_TK: Tensor
    topk_weights_TK: Tensor
    prob_TE: Tensor | None


class TokenChoiceGate(Gate):
    """capacity_factor None (dropless), else a group's expert keeps ceil(factor * K * T / E) pairs.

    First choices are kept before second ones, earlier tokens before later ones.
    """

    def __init__(
        self, d_model: int, num_experts: int, *, top_k: int = 2, capacity_factor: float | None = None
    ) -> None:
        super().__init__(d_model, num_experts)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"{type(self).__name__}: expected top_k of 1 to {num_experts} experts, got {top_k}"
            )
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"{type(self).__name__}: expected capacity_factor > 0, got {capacity_factor}")
        self.top_k, self.capacity_factor = top_k, capacity_factor

    @abstractmethod
    def scores(self, x_TD: Tensor) -> Scores:
        """x_TD is float32."""

    def forward(self, x_GTD: Tensor) -> Routing:
        G, T, D = x_GTD.shape
        scores = self.scores(x_GTD.reshape(G * T, D).float())
        ids_TK = scores.topk_ids_TK
        balance = None
        if scores.prob_TE is not None:
            assigned_E = torch.bincount(ids_TK.reshape(-1), minlength=self.num_experts)
            balance = Balance(assigned_E, scores.prob_TE.sum(0))
        if self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * self.top_k * T / self.num_experts)
            ids_GTK = ids_TK.view(G, T, self.top_k)
            ids_TK = within_capacity(ids_GTK, self.num_experts, capacity).flatten(0, 1)
        return Routing(pairs_of(ids_TK, scores.topk_weights_TK, self.num_experts), balance)


def within_capacity(ids_GTK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """The same ids with DROPPED where the expert already has `capacity` pairs of the group."""
    by_choice_GR = ids_GTK.transpose(1, 2).flatten(1)
    one_hot_GRE = F.one_hot(by_choice_GR, num_experts)
    place_GR = (one_hot_GRE.cumsum(1) * one_hot_GRE).sum(-1)
    kept_GR = torch.where(place_GR <= capacity, by_choice_GR, DROPPED)
    return kept_GR.view(len(ids_GTK), ids_GTK.shape[2], ids_GTK.shape[1]).transpose(1, 2)


class GShardGate(TokenChoiceGate):
    """Softmax(KeepTopK(x W_g + N(0, 1) * Softplus(x W_noise), K)); the noise in training only.

    Source: GShard (arXiv 2006.16668) with the noise of arXiv 1701.06538.
    """

    def __init__(
        self, d_model: int, num_experts: int, *, top_k: int = 2, capacity_factor: float | None = None
    ) -> None:
        super().__init__(d_model, num_experts, top_k=top_k, capacity_factor=capacity_factor)
        self.weight_ED = matrix(num_experts, d_model)
        self.noise_ED = nn.Parameter(torch.zeros(num_experts, d_model))

    def noise(self, x_TD: Tensor) -> Tensor:
        """Standard normal, one value a token and expert."""
        return torch.randn(x_TD.shape[0], self.num_experts, device=x_TD.device)

    def scores(self, x_TD: Tensor) -> Scores:
        logits_TE = F.linear(x_TD, self.weight_ED.float())
        if self.training:
            logits_TE = logits_TE + self.noise(x_TD) * F.softplus(F.linear(x_TD, self.noise_ED.float()))
        kept_TK, ids_TK = logits_TE.topk(self.top_k)
        return Scores(ids_TK, kept_TK.softmax(-1), logits_TE.softmax(-1))


class SigmoidGate(TokenChoiceGate):
    """The K largest of H = x W_g, outputs scaled by sigmoid(H). The source has no balancing loss.

    Source: BASE layers (arXiv 2103.16716), as FSMoE (arXiv 2501.10714) takes it.
    """

    def __init__(
        self, d_model: int, num_experts: int, *, top_k: int = 2, capacity_factor: float | None = None
    ) -> None:
        super().__init__(d_model, num_experts, top_k=top_k, capacity_factor=capacity_factor)
        self.weight_ED = matrix(num_experts, d_model)

    def scores(self, x_TD: Tensor) -> Scores:
        logits_TK, ids_TK = F.linear(x_TD, self.weight_ED.float()).topk(self.top_k)
        return Scores(ids_TK, logits_TK.sigmoid(), None)


class XMoEGate(TokenChoiceGate):
    """Softmax of cosine(projection of x, embedding of e) / temperature; the K largest as they are.

    The projection's dim is E / 2 unless given; the temperature is learnt. Source: X-MoE (arXiv 2204.09179).
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int = 2,
        capacity_factor: float | None = None,
        projection_dim: int | None = None,
        temperature: float = 0.3,
    ) -> None:
        super().__init__(d_model, num_experts, top_k=top_k, capacity_factor=capacity_factor)
        projection_dim = max(2, num_experts // 2) if projection_dim is None else projection_dim
        if not (projection_dim >= 1 and temperature > 0):
            raise ValueError(
                f"XMoEGate: expected projection_dim >= 1 and temperature > 0, got {projection_dim}, {temperature}"
            )
        self.projection_PD = matrix(projection_dim, d_model)
        self.embedding_EP = matrix(num_experts, projection_dim)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def scores(self, x_TD: Tensor) -> Scores:
        low_TP = F.normalize(F.linear(x_TD, self.projection_PD.float()), dim=-1)
        cosine_TE = F.linear(low_TP, F.normalize(self.embedding_EP.float(), dim=-1))
        prob_TE = (cosine_TE * (-self.log_temperature.float()).exp()).softmax(-1)
        weights_TK, ids_TK = prob_TE.topk(self.top_k)
        return Scores(ids_TK, weights_TK, prob_TE)
