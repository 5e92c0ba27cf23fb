"""What the adapters of families off the experts interface share: the spec is read off the layout."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from hostcompute import ExpertSpec
from monde.models.adapters.activation import detect_gated, detect_ungated
from monde.models.adapters.base import Adapter, spec_dtype


class LayoutAdapter(Adapter):
    """Subclasses give `layout`, `num_experts`, the non-linearity and `forward`."""

    @abstractmethod
    def num_experts(self, module: Any) -> int:
        """E, identity experts not counted."""

    @abstractmethod
    def act(self, module: Any, gate: Tensor) -> Tensor:
        """The non-linearity alone; of the gate, or of the only projection where there is no gate."""

    def gated_act(self, module: Any, gate: Tensor, up: Tensor) -> Tensor:
        """The expert's hidden values from gate and up."""
        return self.act(module, gate) * up

    def spec(self, module: nn.Module) -> ExpertSpec:
        layout, num_experts = self.layout(module), self.num_experts(module)
        up_FD = layout.up.of(module.get_parameter(layout.up.param_name(0)), 0, num_experts)
        if layout.gate is not None:
            activation = detect_gated(lambda gate, up: self.gated_act(module, gate, up), module)
        else:
            activation = detect_ungated(lambda up: self.act(module, up), module)
        return ExpertSpec(
            num_experts=num_experts,
            d_model=up_FD.shape[1],
            d_ffn=up_FD.shape[0],
            dtype=spec_dtype(up_FD.dtype),
            gated=layout.gate is not None,
            activation=activation,
            has_bias=layout.up_bias is not None,
        )
