"""NLLB-MoE: one module per expert, biases, ReLU, no gate; the router hands over its top-2 combine weights.

Upstream takes the top-1 mask (zeros and ones) for expert ids, so that only experts 0 and 1 ever run. monde
routes as the router decided; `MondeConfig(nllb_upstream_routing=True)` reproduces upstream.

Letters: T tokens, E experts, K top-k, D model dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monde.config import MondeConfig
from monde.models.adapters.base import ExpertAxis, ExpertLayout, ExpertsFn, WeightView
from monde.models.adapters.by_layout import LayoutAdapter


class NllbMoeAdapter(LayoutAdapter):
    class_names = ("NllbMoeExperts",)

    def __init__(self, upstream_routing: bool = False) -> None:
        self.upstream_routing = upstream_routing

    def configured(self, config: MondeConfig) -> NllbMoeAdapter:
        return NllbMoeAdapter(config.nllb_upstream_routing)

    def layout(self, module: Any) -> ExpertLayout:
        return ExpertLayout(
            up=WeightView("expert_{e}.fc1.weight", ExpertAxis.NAMED),
            down=WeightView("expert_{e}.fc2.weight", ExpertAxis.NAMED),
            up_bias=WeightView("expert_{e}.fc1.bias", ExpertAxis.NAMED),
            down_bias=WeightView("expert_{e}.fc2.bias", ExpertAxis.NAMED),
        )

    def num_experts(self, module: Any) -> int:
        return int(module.num_experts)

    def act(self, module: Any, gate: Tensor) -> Tensor:
        return module.expert_0.act(gate)  # type: ignore[no-any-return]

    def forward(self, module: Any, experts: ExpertsFn, *args: Any, **kwargs: Any) -> Tensor:
        x_TD, top1_mask_TE, probs_TE = args
        if self.upstream_routing:
            # The mask's values serve as ids: expert 0 takes every weight but the top-1, expert 1 the top-1.
            top1_T, all_T = (probs_TE * top1_mask_TE).sum(dim=-1), probs_TE.sum(dim=-1)
            weights_TK = torch.stack((all_T - top1_T, top1_T), dim=-1)
            ids_TK = torch.arange(2, device=x_TD.device).expand_as(weights_TK)
        else:
            weights_TK, ids_TK = probs_TE.topk(2, dim=-1)  # 0 for a choice beyond its expert's capacity
        return experts(x_TD, ids_TK, weights_TK * (1 - module.moe_token_dropout))
