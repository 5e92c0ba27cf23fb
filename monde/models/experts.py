"""The expert modules of one model: finding them, taking their parameters out, and giving the values back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hostcompute import ExpertSpec
from monde.engine import Engine
from monde.models.adapters.base import Adapter, ExpertAxis, ExpertLayout
from monde.models.families import UNSUPPORTED, adapter_of, supported_families
from monde.models.op import ExpertsHandle
from monde.models.state_dict import GiveExperts, TakeExperts

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class UnsupportedModelError(ValueError):
    """The model has no experts, or none that monde knows how to run."""


@dataclass
class ExpertsModule:
    """One module that holds experts, described by its adapter. `name` is its path in the model.

    `tied`: paths and modules with these very parameters. They share the experts as they shared those.
    """

    name: str
    module: nn.Module
    adapter: Adapter
    spec: ExpertSpec
    layout: ExpertLayout
    tied: list[tuple[str, nn.Module]] = field(default_factory=list)
    taken: dict[str, TakenParameter] = field(default_factory=dict)

    def param_names(self) -> list[str]:
        """Names of the expert parameters, relative to the module."""
        return self.layout.param_names(self.spec.num_experts)

    def full_name(self, param: str) -> str:
        return _join(self.name, param)

    def all_full_names(self) -> list[str]:
        """The names of the expert parameters in the model, those of tied modules included."""
        return [_join(path, param) for path, _ in self.places() for param in self.param_names()]

    def arrays(self, expert_id: int) -> dict[str, Tensor]:
        """One expert of a live module, as views of its parameters under the keywords of ExpertBank.load."""
        return {
            role: view.of(
                self.module.get_parameter(view.param_name(expert_id)).detach(),
                expert_id,
                self.spec.num_experts,
            )
            for role, view in self.layout.roles()
        }

    def take_parameters(self) -> None:
        """Remove the expert parameters from the module, remembering what `rebuild` needs."""
        for name in self.param_names():
            param = self.module.get_parameter(name)
            for _, module in self.places():
                owner, leaf = _owner(module, name)
                del owner._parameters[leaf]
                owner.__dict__[leaf] = _stand_in(param)
            tail = self.tail_of(name, param.detach()).clone()
            self.taken[name] = TakenParameter(tuple(param.shape), param.dtype, param.requires_grad, tail)

    def tail_of(self, name: str, param: Tensor) -> Tensor:
        """Rows past the last expert belong to no view (identity experts); kept, so that saving is exact."""
        return param[self.spec.num_experts if name in self._stacked_names() else param.shape[0] :]

    def rebuild(self, engine: Engine, layer_idx: int) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every parameter taken, with the values it had."""
        tensors = {name: taken.empty() for name, taken in self.taken.items()}
        num_experts = self.spec.num_experts
        for expert_id in range(num_experts):
            exported = engine.export_expert(layer_idx, expert_id)
            for role, view in self.layout.roles():
                view.of(tensors[view.param_name(expert_id)], expert_id, num_experts).copy_(exported[role])
        yield from tensors.items()

    def put_back(self, engine: Engine, layer_idx: int) -> None:
        """Undo `take_parameters`."""
        for name, tensor in self.rebuild(engine, layer_idx):
            param = nn.Parameter(tensor, requires_grad=self.taken[name].requires_grad)
            for _, module in self.places():
                owner, leaf = _owner(module, name)
                del owner.__dict__[leaf]
                owner.register_parameter(leaf, param)
        self.taken.clear()

    def attach(self, engine: Engine, layer_idx: int) -> None:
        """Route the module's calls to the engine and its state dict through `rebuild`."""
        adapter = self.adapter.configured(engine.config)
        give, take = GiveExperts(self, engine, layer_idx), TakeExperts(self, engine, layer_idx)
        for _, module in self.places():
            adapter.attach(module, ExpertsHandle(engine.fronts[layer_idx]))
            module.register_state_dict_post_hook(give)
            if engine.ranked is None:
                module.register_load_state_dict_pre_hook(take)

    def _stacked_names(self) -> set[str]:
        return {view.param for _, view in self.layout.roles() if view.axis is ExpertAxis.STACKED}

    def places(self) -> list[tuple[str, nn.Module]]:
        """(path, module) of all that call these experts."""
        return [(self.name, self.module), *self.tied]


def _join(path: str, param: str) -> str:
    return f"{path}.{param}" if path else param


def _owner(module: nn.Module, param: str) -> tuple[nn.Module, str]:
    path, _, leaf = param.rpartition(".")
    return module.get_submodule(path), leaf


def _stand_in(param: Tensor) -> nn.Parameter:
    """The shape of a parameter that was taken, for code that asks the module.

    transformers asks when it initialises weights and when it converts them for saving. Not registered, so
    that nobody moves, counts or saves it.
    """
    stand_in = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device="meta"), requires_grad=False)
    stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
    return stand_in


@dataclass(frozen=True)
class TakenParameter:
    """What a removed parameter looked like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    tail: Tensor  # rows that belong to no expert, usually none; on the meta device if they never had values

    def empty(self) -> Tensor:
        """A tensor to be filled with the experts' values."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if len(self.tail):
            tensor[-len(self.tail) :] = 0 if self.tail.is_meta else self.tail
        return tensor


def find_experts(model: nn.Module) -> list[ExpertsModule]:
    """Every module of `model` that holds experts, in the order of its layers.

    Errors: UnsupportedModelError when there is none; ValueError for weights or activations not supported.
    """
    found: dict[tuple[int, ...], ExpertsModule] = {}
    for path, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is None:
            continue
        experts = ExpertsModule(path, module, adapter, adapter.spec(module), adapter.layout(module))
        params = tuple(id(module.get_parameter(name)) for name in experts.param_names())
        if params in found:
            found[params].tied.append((path, module))
        else:
            found[params] = experts
    if not found:
        raise UnsupportedModelError(_why_none(model))
    return list(found.values())


def _why_none(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = getattr(config, "model_type", type(model).__name__)
    if kind in UNSUPPORTED:
        return f"{kind}: not supported, as {UNSUPPORTED[kind]}; run it with transformers alone"
    if any(getattr(text_config, name, None) for name in _EXPERT_COUNTS):
        names = ", ".join(family.name for family in supported_families())
        return f"{kind}: monde does not know how this family holds its experts. Supported: {names}"
    return f"{kind}: the model has no experts, so monde has nothing to do; run it with transformers alone"
