"""The arguments of one decode step: what identifies its graph, and the buffers that the graph reads."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

_PLAIN = (bool, int, float, str, torch.dtype, type(None))


class NotCapturableError(ValueError):
    """This step cannot run as a graph; the message says why."""


@dataclass(frozen=True)
class StepArguments:
    """The keyword arguments of a step. `key` is equal for steps that one graph can run, up to the cache.

    tensors: the tensors in order, those of nested mappings (one mask per layer type) included.
    """

    kwargs: Mapping[str, Any]
    key: Hashable
    tensors: list[Tensor]

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> StepArguments:
        """Errors: NotCapturableError for values that are neither tensors, plain nor the cache."""
        key: list[Hashable] = []
        tensors: list[Tensor] = []
        _describe(kwargs, key, tensors)
        return cls(kwargs, tuple(key), tensors)


class StaticArguments:
    """Buffers at fixed addresses for the tensors of a step, and its other arguments.

    The cache is left out: it owns its addresses, and holding it would keep it alive.
    """

    def __init__(self, step: StepArguments) -> None:
        # An inference tensor could not be filled outside inference mode.
        with torch.inference_mode(False):
            self.buffers = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in step.tensors]
        self.fill(step)
        remaining = iter(self.buffers)
        self._kwargs = _replace(step.kwargs, lambda _: next(remaining))

    def fill(self, step: StepArguments) -> None:
        for buffer, tensor in zip(self.buffers, step.tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)

    def kwargs(self, cache: Cache) -> dict[str, Any]:
        return {**self._kwargs, "past_key_values": cache}


def _describe(values: Mapping[str, Any], key: list[Hashable], tensors: list[Tensor]) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor):
            key.append((name, tuple(value.shape), value.dtype, value.device))
            tensors.append(value)
        elif isinstance(value, _PLAIN):
            key.append((name, type(value), value))
        elif isinstance(value, dict):
            key.append((name, len(value)))
            _describe(value, key, tensors)
        elif not (name == "past_key_values" and isinstance(value, Cache)):
            raise NotCapturableError(f"the argument {name} is a {type(value).__name__}")


def _replace(values: Mapping[str, Any], buffer_of: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same tree with buffers for tensors and without caches; visits tensors as `_describe` does."""
    replaced: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            replaced[name] = buffer_of(value)
        elif isinstance(value, dict):
            replaced[name] = _replace(value, buffer_of)
        elif not isinstance(value, Cache):
            replaced[name] = value
    return replaced
