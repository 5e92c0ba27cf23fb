"""LongCat-Flash: expert ids past the real experts stand for the identity.

Letters: T tokens, E experts, K top-k, D model dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monde.models.adapters.base import ExpertLayout, ExpertsFn, WeightView, fused_gate_up
from monde.models.adapters.by_layout import LayoutAdapter


class LongcatAdapter(LayoutAdapter):
    class_names = ("LongcatFlashExperts",)

    def layout(self, module: Any) -> ExpertLayout:
        gate, up = fused_gate_up("gate_up_proj")  # has unused rows for the identity experts too
        return ExpertLayout(up, WeightView("down_proj"), gate)

    def num_experts(self, module: Any) -> int:
        return int(module.num_routed_experts)

    def act(self, module: Any, gate: Tensor) -> Tensor:
        return module.act_fn(gate)  # type: ignore[no-any-return]

    def forward(self, module: Any, experts: ExpertsFn, *args: Any, **kwargs: Any) -> Tensor:
        x_TD, topk_ids_TK, topk_weights_TK = args
        is_identity_TK = topk_ids_TK >= module.num_routed_experts
        identity_TD: Tensor = x_TD * topk_weights_TK.where(is_identity_TK, 0).sum(dim=-1, keepdim=True)
        return experts(x_TD, topk_ids_TK, topk_weights_TK) + identity_TD.to(x_TD.dtype)
