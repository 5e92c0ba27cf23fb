"""One adapter for every class under transformers' `use_experts_implementation`, some sixty families."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hostcompute import ExpertSpec
from monde.models.adapters.activation import detect_gated, detect_ungated
from monde.models.adapters.base import (
    Adapter,
    ExpertLayout,
    ExpertsFn,
    WeightView,
    fused_gate_up,
    per_pair,
    spec_dtype,
)


class ExpertsInterfaceAdapter(Adapter):
    """Layout flags and the signature of the call come from the decorator."""

    def matches(self, module: nn.Module) -> bool:
        return (
            hasattr(module, "is_concatenated")
            and hasattr(module, "_apply_gate")
            and hasattr(module, "num_experts")
        )

    def layout(self, module: Any) -> ExpertLayout:
        transposed = bool(module.is_transposed)
        down = WeightView("down_proj", transposed=transposed)
        down_bias = WeightView("down_proj_bias") if module.has_bias else None
        if not module.has_gate:
            up_bias = WeightView("up_proj_bias") if module.has_bias else None
            return ExpertLayout(
                WeightView("up_proj", transposed=transposed), down, up_bias=up_bias, down_bias=down_bias
            )
        interleaved = not module.is_concatenated
        gate, up = fused_gate_up("gate_up_proj", transposed=transposed, interleaved=interleaved)
        if not module.has_bias:
            return ExpertLayout(up, down, gate)
        gate_bias, up_bias = fused_gate_up("gate_up_proj_bias", interleaved=interleaved)
        return ExpertLayout(up, down, gate, up_bias, down_bias, gate_bias)

    def spec(self, module: Any) -> ExpertSpec:
        out_in = module.down_proj.shape[1:]
        d_model, d_ffn = reversed(out_in) if module.is_transposed else out_in
        if module.has_gate:
            activation = detect_gated(lambda gate, up: module._apply_gate(_fuse(module, gate, up)), module)
        else:
            activation = detect_ungated(module.act_fn, module)
        return ExpertSpec(
            num_experts=module.down_proj.shape[0],
            d_model=d_model,
            d_ffn=d_ffn,
            dtype=spec_dtype(module.down_proj.dtype),
            gated=bool(module.has_gate),
            activation=activation,
            has_bias=bool(module.has_bias),
        )

    def forward(self, module: Any, experts: ExpertsFn, *args: Any, **kwargs: Any) -> Tensor:
        # The families name the three arguments differently; their order is the interface's.
        x_TD, topk_ids_TK, topk_weights_TK = (*args, *kwargs.values())
        if not getattr(module, "has_post_expert_norm", False):  # absent before transformers 5.23
            return experts(x_TD, topk_ids_TK, topk_weights_TK)
        y_TKD: Tensor = module.post_expert_norm(per_pair(experts, x_TD, topk_ids_TK))
        y_TD: Tensor = (y_TKD * topk_weights_TK[:, :, None]).sum(dim=1)
        return y_TD.to(x_TD.dtype)


def _fuse(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    if module.is_concatenated:
        return torch.cat((gate, up), dim=-1)
    return torch.stack((gate, up), dim=-1).flatten(-2)
