"""A transformers model made ready for training with sharded experts, and made whole again.

The model's own router, shared experts and norms stay: only what computes experts is replaced, one class for all
families of transformers' experts interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from monde.models.families import EXPERTS_INTERFACE
from monde.planning.pipeline import UNSCHEDULED, Degrees
from monde.training.fabric import Fabric, fabric_of
from monde.training.hooks import NO_HOOKS, Hooks
from monde.training.layer import ShardedExperts
from monde.training.whole import gathered


class ConvertedExperts(ShardedExperts):
    """In the place of `original`, whose parameters it took over."""

    def __init__(self, original: nn.Module, fabric: Fabric, schedule: Any, hooks: Hooks) -> None:
        spec = EXPERTS_INTERFACE.spec(original)
        super().__init__(spec, fabric, schedule=schedule, hooks=hooks, initialise=False)
        layout = EXPERTS_INTERFACE.layout(original)
        names = layout.param_names(spec.num_experts)
        others = [name for name, _ in original.named_parameters() if name not in names]
        if others:
            raise ValueError(
                f"{type(original).__name__}: holds {', '.join(others)} beside its experts, which training does "
                "not support; train this model without conversion"
            )
        self._fill(original, layout)
        for name, param in self.weights.weights().items():
            role_view = dict(layout.roles())[name]
            param.requires_grad_(original.get_parameter(role_view.param).requires_grad)
        # Outside torch's registry: its parameters would be trained and saved twice.
        self.__dict__["original"] = original.to("meta")

    @torch.no_grad()
    def _fill(self, original: nn.Module, layout: Any) -> None:
        experts = self.weights.expert_range
        for name, view in layout.roles():
            local = self.weights.get_parameter(name)
            param = original.get_parameter(view.param)
            for e in range(experts.start, experts.stop):
                one = view.of(param, e, self.weights.spec.num_experts)
                if name != "down_bias":
                    one = one[..., self.weights.ffn_range] if name == "down" else one[self.weights.ffn_range]
                local[e - experts.start].copy_(one)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # The families name the three arguments differently; their order is the interface's.
        x_TD, topk_ids_TK, topk_weights_TK = (*args, *kwargs.values())
        return super().forward(x_TD, topk_ids_TK, topk_weights_TK)

    @torch.no_grad()
    def restored(self) -> nn.Module:
        """The original module with the values trained. Collective; every rank holds all of it."""
        original: nn.Module = self.__dict__["original"].to_empty(device=self.fabric.device)
        for name, view in EXPERTS_INTERFACE.layout(original).roles():
            whole = gathered(self.weights, name)
            for e in range(self.weights.spec.num_experts):
                view.of(original.get_parameter(view.param), e, len(whole)).copy_(whole[e])
        return original


def convert(
    model: nn.Module,
    mesh: DeviceMesh | Fabric | None = None,
    *,
    schedule: Degrees | Callable[[int], Degrees] = UNSCHEDULED,
    hooks: Hooks = NO_HOOKS,
) -> nn.Module:
    """Replace the experts of a transformers model, or of one block, in place; outputs stay equal.

    Collective: every rank has loaded the same weights and keeps its part. `weights`, `load` of each replaced module
    as in ShardedExperts. `restore` undoes it.
    Errors: ValueError when there are no experts on transformers' experts interface.
    """
    fabric = fabric_of(mesh)
    places = [
        (parent, name, child) for parent, name, child in _children(model) if EXPERTS_INTERFACE.matches(child)
    ]
    if not places:
        raise ValueError(
            f"{type(model).__name__}: no experts on transformers' experts interface to train; `monde.training` "
            "converts families such as Mixtral, Qwen3-MoE, OLMoE; see docs/models.md"
        )
    converted: dict[nn.Module, ConvertedExperts] = {}  # a module in two places stays one
    for parent, name, child in places:
        if child not in converted:
            converted[child] = ConvertedExperts(child, fabric, schedule, hooks)
        setattr(parent, name, converted[child])
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `convert`, keeping what was trained: save_pretrained then writes an ordinary checkpoint. Collective."""
    originals: dict[nn.Module, nn.Module] = {}
    for parent, name, child in list(_children(model)):
        if isinstance(child, ConvertedExperts):
            if child not in originals:
                originals[child] = child.restored()
            setattr(parent, name, originals[child])
    return model


def converted_experts(model: nn.Module) -> list[ConvertedExperts]:
    """In the order of the layers."""
    return [module for module in model.modules() if isinstance(module, ConvertedExperts)]


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child
