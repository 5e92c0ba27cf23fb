"""Which checkpoint tensors make up which expert, following transformers' own key renamings and conversions.

transformers merges a layer's experts into whole parameters while it loads. Here the same conversions run on
one expert at a time, so that no more than one expert is ever materialised besides its place in the bank.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from monde.models.adapters.base import ExpertAxis, WeightView
from monde.models.experts import ExpertsModule
from monde.weights.checkpoint import Checkpoint, CheckpointError


@dataclass
class ParameterSource:
    """The checkpoint tensors of one parameter: keys by the converter pattern they match, in expert order."""

    param: str  # full name in the model
    shape: tuple[int, ...]  # of the whole parameter
    num_experts: int
    converter: WeightConverter | None
    keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def all_keys(self) -> Iterator[str]:
        for keys in self.keys.values():
            yield from keys

    @property
    def num_allowed(self) -> set[int]:
        """How many experts a checkpoint may hold; those past num_experts are identities, not read."""
        return {self.num_experts, self.shape[0]}

    @property
    def is_per_expert(self) -> bool:
        """Whether the conversion of one expert needs the tensors of that expert alone."""
        if self.converter is None:
            return False
        ops = self.converter.operations
        counts = {len(keys) for keys in self.keys.values()}
        if isinstance(ops[0], MergeModulelist):
            return ops[0].dim == 0 and counts <= self.num_allowed and all(map(_keeps_experts_apart, ops[1:]))
        return counts == {1} and all(map(_keeps_experts_apart, ops))

    def plain_part(self, view: WeightView, expert_id: int) -> str | None:
        """The key that holds just the matrix of `view`, where the conversion only stacks and concatenates."""
        if self.converter is None or not self.is_per_expert or view.interleaved or view.transposed:
            return None
        patterns, ops = self.converter.source_patterns, self.converter.operations
        stacks = isinstance(ops[0], MergeModulelist)
        concatenates = len(ops) == 2 and isinstance(ops[1], Concatenate) and ops[1].dim == 1
        if stacks and len(patterns) == view.num_parts and (concatenates or len(ops) == len(patterns) == 1):
            return self.keys[patterns[view.part]][expert_id]
        return None

    def check_complete(self) -> None:
        """Errors: CheckpointError when tensors of some expert are missing or more than expected."""
        for pattern in self.converter.source_patterns if self.converter is not None else []:
            if pattern not in self.keys:
                raise CheckpointError(
                    f"{self.param}: the checkpoint has no tensor matching {pattern}; it is incomplete"
                )
        if self.converter is None or not isinstance(self.converter.operations[0], MergeModulelist):
            return
        for keys in self.keys.values():
            if len(keys) in self.num_allowed:
                continue
            ids = [int(number) for key in keys for number in re.findall(r"\d+", key)[-1:]]
            missing = sorted(set(range(self.num_experts)) - set(ids))
            extra = sorted(set(ids) - set(range(self.num_experts)))
            problem = f"lacks experts {missing}" if missing else f"has unexpected experts {extra}"
            raise CheckpointError(
                f"{self.param}: the checkpoint {problem} (like {keys[0]}), and config.json says "
                f"{self.num_experts} experts; use the config and all shards of one model"
            )


class ModuleSource:
    """Reads single experts of one module out of a checkpoint."""

    def __init__(
        self, module: ExpertsModule, params: dict[str, ParameterSource], checkpoint: Checkpoint, config: Any
    ) -> None:
        self.module, self.params, self.checkpoint, self.config = module, params, checkpoint, config
        self._whole: dict[str, Tensor] = {}

    def arrays(self, expert_id: int) -> dict[str, Tensor]:
        """One expert under the keywords of ExpertBank.load.

        Errors: CheckpointError for shapes and element types.
        """
        slabs: dict[str, Tensor] = {}
        arrays: dict[str, Tensor] = {}
        for role, view in self.module.layout.roles():
            source = self.params[view.param_name(expert_id)]
            key = source.plain_part(view, expert_id)
            if key is not None:
                arrays[role] = self.checkpoint.tensor(key)
            else:
                if source.param not in slabs:
                    slabs[source.param] = self._slab(source, view, expert_id)
                arrays[role] = view.matrix(slabs[source.param])
            self._check_shape(source, role, arrays[role], key)
        return arrays

    def _slab(self, source: ParameterSource, view: WeightView, expert_id: int) -> Tensor:
        """One expert's own slice of a parameter."""
        num_experts = self.module.spec.num_experts
        if source.converter is None:
            (key,) = source.all_keys
            tensor = self.checkpoint.tensor(key)
            self._check_rows(source, view, tensor, key)
            return view.slab(tensor, expert_id, num_experts)
        if source.is_per_expert and view.axis is ExpertAxis.STACKED:
            stacks = isinstance(source.converter.operations[0], MergeModulelist)
            inputs = {
                pattern: [
                    self.checkpoint.tensor(keys[expert_id]) if stacks else self._one(keys[0], expert_id)
                ]
                for pattern, keys in source.keys.items()
            }
            return self._convert(source, inputs, (1, *source.shape[1:]))[0]
        # Conversions that mix experts: this one parameter is converted whole and dropped with the module.
        if source.param not in self._whole:
            inputs = {
                pattern: list(map(self.checkpoint.tensor, keys)) for pattern, keys in source.keys.items()
            }
            self._whole[source.param] = self._convert(source, inputs, source.shape)
        return view.slab(self._whole[source.param], expert_id, num_experts)

    def _one(self, key: str, expert_id: int) -> Tensor:
        return self.checkpoint.tensor(key)[expert_id : expert_id + 1]

    def _convert(
        self, source: ParameterSource, tensors: dict[str, list[Tensor]], shape: tuple[int, ...]
    ) -> Tensor:
        """Run the converter; `shape` is what comes out."""
        converter = source.converter
        assert converter is not None
        values: Any = tensors
        for operation in converter.operations:
            values = operation.convert(
                values,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=source.param,
                model=_ShapeOnly(shape),
                config=self.config,
                missing_keys=None,
            )
        value = next(v for k, v in values.items() if len(values) == 1 or k.replace("\\", "") in source.param)
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return tensor

    def _check_rows(self, source: ParameterSource, view: WeightView, tensor: Tensor, key: str) -> None:
        if view.axis is ExpertAxis.STACKED and tensor.shape[0] < self.module.spec.num_experts:
            raise CheckpointError(
                f"{key} holds {tensor.shape[0]} experts and config.json says {self.module.spec.num_experts}; "
                "use the config and weights of one model"
            )

    def _check_shape(self, source: ParameterSource, role: str, array: Tensor, key: str | None) -> None:
        D, F = self.module.spec.d_model, self.module.spec.d_ffn
        last = D if role.startswith("down") else F
        expected = (last,) if role.endswith("_bias") else (last, F if role == "down" else D)
        if tuple(array.shape) != expected:
            raise CheckpointError(
                f"{key or source.param}: expected shape {list(expected)} for one expert's {role}, the "
                f"checkpoint has {list(array.shape)}; use the config and weights of one model"
            )


@dataclass(frozen=True)
class _ShapeOnly:
    """Stands in for the model in conversions, which ask it for the shape of the parameter they make."""

    shape: tuple[int, ...]

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self.shape, device="meta")


@dataclass(frozen=True)
class KeyUse:
    """What one tensor of a checkpoint becomes: the parameters it contributes to, whether the model has them or not."""

    key: str
    params: list[str]
    pattern: str | None
    converter: WeightConverter | None


def uses_of(model: Any, keys: Iterable[str]) -> Iterator[KeyUse]:
    """In natural order of the keys, so that experts come by number."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state_dict = model.state_dict()
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state_dict)
        if name not in state_dict and key in state_dict:
            name, pattern = key, None
        converter = converter_of.get(pattern) if pattern else None
        yield KeyUse(key, _targets(name, converter), pattern, converter)


def find_sources(model: Any, modules: Sequence[ExpertsModule], checkpoint: Checkpoint) -> list[ModuleSource]:
    """One source per module. Must run before the modules lose their parameters. Errors: CheckpointError."""
    num_experts = {name: m.spec.num_experts for m in modules for name in m.all_full_names()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, ParameterSource] = {}
    for use in uses_of(model, checkpoint.entries):
        for param in use.params:
            if param in num_experts:
                source = found.setdefault(
                    param, ParameterSource(param, shapes[param], num_experts[param], use.converter)
                )
                source.keys[use.pattern or use.key].append(use.key)
    for tied, original in model.all_tied_weights_keys.items():  # a checkpoint holds one of them
        if original in found:
            found.setdefault(tied, found[original])
    sources = []
    for module in modules:
        params = {}
        for name in module.param_names():
            full_name = module.full_name(name)
            if full_name not in found:
                raise CheckpointError(
                    f"the checkpoint has no tensor for {full_name}; it is incomplete or of another model"
                )
            found[full_name].check_complete()
            params[name] = found[full_name]
        sources.append(ModuleSource(module, params, checkpoint, model.config))
    return sources


def _targets(name: str, converter: WeightConverter | None) -> list[str]:
    """The parameters that a renamed key contributes to; a converter may have several."""
    if converter is None:
        return [name]
    first, *others = converter.target_patterns
    return [name, *(name.replace(first, other) for other in others)]


def _keeps_experts_apart(operation: Any) -> bool:
    """Whether the operation leaves the expert axis, the first one, alone."""
    if isinstance(operation, Transpose):
        return operation.dim0 != 0 and operation.dim1 != 0
    return isinstance(operation, Concatenate | Interleave | Chunk) and operation.dim != 0
