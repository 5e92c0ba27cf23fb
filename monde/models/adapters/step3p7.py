"""Step 3.7: the canonical layout without the decorator; some layers clamp after the activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monde.models.adapters.base import ExpertLayout, ExpertsFn, WeightView, fused_gate_up
from monde.models.adapters.by_layout import LayoutAdapter


class Step3p7Adapter(LayoutAdapter):
    class_names = ("Step3p7Experts",)

    def layout(self, module: Any) -> ExpertLayout:
        gate, up = fused_gate_up("gate_up_proj")
        return ExpertLayout(up, WeightView("down_proj"), gate)

    def num_experts(self, module: Any) -> int:
        return int(module.num_experts)

    def act(self, module: Any, gate: Tensor) -> Tensor:
        return module.act_fn(gate)  # type: ignore[no-any-return]

    def gated_act(self, module: Any, gate: Tensor, up: Tensor) -> Tensor:
        return module._apply_gate(torch.cat((gate, up), dim=-1))  # type: ignore[no-any-return]

    def forward(self, module: Any, experts: ExpertsFn, *args: Any, **kwargs: Any) -> Tensor:
        return experts(*args)
