"""Aria before transformers 5.23, when its experts chose their own top-k from router logits.

Letters: T tokens, E experts, K top-k, D model dim.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from monde.models.adapters.base import ExpertLayout, ExpertsFn, WeightView, fused_gate_up
from monde.models.adapters.by_layout import LayoutAdapter


class AriaAdapter(LayoutAdapter):
    class_names = ("AriaExperts",)

    def matches(self, module: nn.Module) -> bool:
        return super().matches(module) and hasattr(module, "route_tokens_to_experts")

    def layout(self, module: Any) -> ExpertLayout:
        gate, up = fused_gate_up("fc1.weight", transposed=True)
        return ExpertLayout(up, WeightView("fc2.weight", transposed=True), gate)

    def num_experts(self, module: Any) -> int:
        return int(module.fc1.groups)

    def act(self, module: Any, gate: Tensor) -> Tensor:
        return F.silu(gate)

    def forward(self, module: Any, experts: ExpertsFn, *args: Any, **kwargs: Any) -> Tensor:
        x_TD, router_logits_TE = args
        topk_ids_TK, topk_weights_TK = module.route_tokens_to_experts(router_logits_TE)
        return experts(x_TD, topk_ids_TK, topk_weights_TK)
