"""DBRX: all experts' rows in one matrix [E * F, D] for each of gate, up and (transposed) down."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monde.models.adapters.base import ExpertAxis, ExpertLayout, ExpertsFn, WeightView
from monde.models.adapters.by_layout import LayoutAdapter


class DbrxAdapter(LayoutAdapter):
    class_names = ("DbrxExperts",)

    def layout(self, module: Any) -> ExpertLayout:
        return ExpertLayout(
            gate=WeightView("mlp.w1", ExpertAxis.FLAT),
            up=WeightView("mlp.v1", ExpertAxis.FLAT),
            down=WeightView("mlp.w2", ExpertAxis.FLAT, transposed=True),
        )

    def num_experts(self, module: Any) -> int:
        return int(module.num_experts)

    def act(self, module: Any, gate: Tensor) -> Tensor:
        return module.mlp.activation_fn(gate)  # type: ignore[no-any-return]

    def forward(self, module: Any, experts: ExpertsFn, *args: Any, **kwargs: Any) -> Tensor:
        hidden_states, topk_ids_TK, topk_weights_TK = args
        y_TD = experts(hidden_states.reshape(-1, hidden_states.shape[-1]), topk_ids_TK, topk_weights_TK)
        return y_TD.view_as(hidden_states)
