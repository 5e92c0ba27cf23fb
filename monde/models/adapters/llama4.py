"""Llama 4: the router's score multiplies the expert's input, and the block adds a shared expert.

Letters: T tokens, K top-k, D model dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monde.models.adapters.base import ExpertLayout, ExpertsFn, WeightView, fused_gate_up, per_pair
from monde.models.adapters.by_layout import LayoutAdapter


class Llama4Adapter(LayoutAdapter):
    """Serves the block, not its `experts`: those are called with every token repeated for every expert."""

    class_names = ("Llama4TextMoe",)

    def layout(self, module: Any) -> ExpertLayout:
        gate, up = fused_gate_up("experts.gate_up_proj", transposed=True)
        return ExpertLayout(up, WeightView("experts.down_proj", transposed=True), gate)

    def num_experts(self, module: Any) -> int:
        return int(module.num_experts)

    def act(self, module: Any, gate: Tensor) -> Tensor:
        return module.experts.act_fn(gate)  # type: ignore[no-any-return]

    def forward(self, module: Any, experts: ExpertsFn, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        (hidden_states,) = args
        x_TD = hidden_states.reshape(-1, module.hidden_dim)
        scores_TE, router_logits_TE = module.router(x_TD)
        scores_TK, ids_TK = scores_TE.topk(module.top_k, dim=-1)
        routed_TD = per_pair(experts, x_TD, ids_TK, scores_TK).sum(dim=1)
        return module.shared_expert(x_TD) + routed_TD, router_logits_TE
