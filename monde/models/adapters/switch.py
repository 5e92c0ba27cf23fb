"""Switch Transformers: one module per expert, ReLU, no gate; the router hands over a one-hot top-1 mask.

Letters: T tokens, E experts, D model dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monde.models.adapters.base import ExpertAxis, ExpertLayout, ExpertsFn, WeightView
from monde.models.adapters.by_layout import LayoutAdapter


class SwitchAdapter(LayoutAdapter):
    class_names = ("SwitchTransformersExperts",)

    def layout(self, module: Any) -> ExpertLayout:
        return ExpertLayout(
            up=WeightView("expert_{e}.wi.weight", ExpertAxis.NAMED),
            down=WeightView("expert_{e}.wo.weight", ExpertAxis.NAMED),
        )

    def num_experts(self, module: Any) -> int:
        return int(module.num_experts)

    def act(self, module: Any, gate: Tensor) -> Tensor:
        return module.expert_0.act(gate)  # type: ignore[no-any-return]

    def forward(self, module: Any, experts: ExpertsFn, *args: Any, **kwargs: Any) -> Tensor:
        x_TD, chosen_T1E, weights_T1 = args
        within_capacity_T1 = chosen_T1E.sum(dim=-1)  # a token beyond its expert's capacity has an empty mask
        return experts(x_TD, chosen_T1E.argmax(dim=-1), weights_T1 * within_capacity_T1)
