"""The gate that chooses nothing: slots are mixtures of tokens, tokens mixtures of slots' outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monde.routing.gates.base import Gate, Mixture, Routing, matrix


class SoftMoEGate(Gate):
    """logits = normalised x times normalised slot embeddings, scaled; dispatch is their softmax over a group's
    tokens, combine their softmax over slots. Not causal. Source: arXiv 2308.00951.
    """

    def __init__(self, d_model: int, num_experts: int, *, slots_per_expert: int = 1) -> None:
        super().__init__(d_model, num_experts)
        if slots_per_expert < 1:
            raise ValueError(f"SoftMoEGate: expected slots_per_expert of at least 1, got {slots_per_expert}")
        self.slots_SD = matrix(num_experts * slots_per_expert, d_model)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_GTD: Tensor) -> Routing:
        slots_SD = self.scale.float() * F.normalize(self.slots_SD.float(), dim=-1)
        logits_GTS = F.linear(F.normalize(x_GTD.float(), dim=-1), slots_SD)
        return Routing(Mixture(logits_GTS.softmax(1), logits_GTS.softmax(2), self.num_experts))
