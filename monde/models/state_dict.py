"""State dicts of a model that monde runs look as if nothing had moved: experts go in and come out under their names."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from monde.engine import Engine

if TYPE_CHECKING:
    from monde.models.experts import ExpertsModule


@dataclass(eq=False)  # torch marks hooks with an attribute, so not frozen
class GiveExperts:
    """Puts the experts into `state_dict`, so that it and `save_pretrained` are what they were."""

    experts: ExpertsModule
    engine: Engine
    layer_idx: int
    # What was put in last. A tied module finds it in its state dict and gives the same tensors, as before monde.
    latest: dict[str, weakref.ref[Tensor]] = field(default_factory=dict)

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
    ) -> None:
        there = {id(tensor) for tensor in state_dict.values()}
        known = ((name, ref()) for name, ref in self.latest.items())
        latest = {name: tensor for name, tensor in known if tensor is not None and id(tensor) in there}
        tensors = latest or dict(self.experts.rebuild(self.engine, self.layer_idx))
        self.latest = {name: weakref.ref(tensor) for name, tensor in tensors.items()}
        state_dict |= {prefix + name: tensor for name, tensor in tensors.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> GiveExperts:
        return self


@dataclass(eq=False)
class TakeExperts:
    """Copies the experts of a `load_state_dict` to where they are, on the host or in slots.

    What torch would find wrong is said in its words and collected as it does, NaN besides; then no expert of this
    layer changes. What is right is gone from the state dict afterwards, for torch has no parameters by those names.
    """

    experts: ExpertsModule
    engine: Engine
    layer_idx: int

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        taken = self.experts.taken
        given = {name: state_dict.pop(prefix + name) for name in taken if prefix + name in state_dict}
        if strict:
            missing_keys += [prefix + name for name in taken if name not in given]
        wrong = [
            f"size mismatch for {prefix + name}: copying a param with shape {tensor.shape} from checkpoint, the shape "
            f"in current model is {torch.Size(taken[name].shape)}."
            for name, tensor in given.items()
            if tuple(tensor.shape) != taken[name].shape
        ]
        wrong = wrong or [
            f"{prefix.rstrip('.')}, expert {expert_id}: {role} has a weight that is NaN or infinite"
            for expert_id in range(self.experts.spec.num_experts)
            for role, array in self._arrays(given, expert_id).items()
            if not bool(array.isfinite().all())
        ]
        if wrong or not given:
            error_msgs += wrong
            return
        self.engine.settle()
        for expert_id in range(self.experts.spec.num_experts):
            arrays = self._arrays(given, expert_id)
            if len(arrays) < len(list(self.experts.layout.roles())):
                arrays = self.engine.export_expert(self.layer_idx, expert_id) | arrays
            self.engine.load_expert(self.layer_idx, expert_id, arrays)
        for name, tensor in given.items():
            tail = self.experts.tail_of(name, tensor).to("cpu", taken[name].dtype, copy=True)
            taken[name] = replace(taken[name], tail=tail)

    def _arrays(self, given: Mapping[str, Tensor], expert_id: int) -> dict[str, Tensor]:
        """What of one expert is given, in its type; copies, for numba's bank refers to what it gets."""
        return {
            role: view.of(given[name], expert_id, self.experts.spec.num_experts)
            .detach()
            .to("cpu", self.experts.taken[name].dtype, copy=True)
            for role, view in self.experts.layout.roles()
            if (name := view.param_name(expert_id)) in given
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> TakeExperts:
        return self


def refuse_state_dicts(model: nn.Module, paths: Iterable[str]) -> None:
    """Over ranks, each of which holds parts: refused in every module with experts, so before any weight is written."""
    above = {"", *(".".join(path.split(".")[:n]) for path in paths for n in range(1, path.count(".") + 2))}
    for path in above:
        model.get_submodule(path).register_load_state_dict_pre_hook(_refuse)


def _refuse(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    raise RuntimeError(
        f"{prefix.rstrip('.') or type(module).__name__}: ranks hold parts of these experts and take weights once, at "
        "loading; save_pretrained the weights and load that folder"
    )
