"""JetMoE: the router returns pairs sorted by expert. Attention experts stay with the dense weights.

Letters: T tokens, K top-k, D model dim, R = T * K routed pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monde.models.adapters.base import ExpertLayout, ExpertsFn, WeightView, fused_gate_up
from monde.models.adapters.by_layout import LayoutAdapter


class JetMoeAdapter(LayoutAdapter):
    class_names = ("JetMoeMoE",)

    def layout(self, module: Any) -> ExpertLayout:
        gate, up = fused_gate_up("input_linear.weight")
        return ExpertLayout(up, WeightView("output_linear.weight"), gate)

    def num_experts(self, module: Any) -> int:
        return int(module.input_linear.num_experts)

    def act(self, module: Any, gate: Tensor) -> Tensor:
        return module.activation(gate)  # type: ignore[no-any-return]

    def forward(self, module: Any, experts: ExpertsFn, *args: Any, **kwargs: Any) -> Tensor:
        (hidden_states,) = args
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        pair_of_sorted_R, _, weights_of_sorted_R, sizes_E, _ = module.router(x_TD)
        ids_of_sorted_R = torch.arange(len(sizes_E)).repeat_interleave(torch.tensor(sizes_E)).to(x_TD.device)
        order_TK = pair_of_sorted_R.argsort().view(len(x_TD), -1)
        y_TD: Tensor = experts(x_TD, ids_of_sorted_R[order_TK], weights_of_sorted_R[order_TK]) + module.bias
        return y_TD.view_as(hidden_states)
