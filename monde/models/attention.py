"""Other attention functions for modules that would call torch's fused one; transformers finds them by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

_SDPA = "sdpa"


def replace_sdpa(model: nn.Module, name: str, function: Callable[..., Any]) -> bool:
    """Let modules whose config says "sdpa" call `function`, with the masks of sdpa; whether any does now.

    Models that ask for that name themselves, as those with sparse attention do before they mask what it leaves out, keep
    it. The others get configs of their own: another model made from the same config keeps torch's.
    """
    if asks_for_sdpa(model):
        return False
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    copies: dict[int, Any] = {}
    configs = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == _SDPA:
            module.config = copy.deepcopy(config, copies)  # type: ignore[assignment]
            configs.append(module.config)
    for config in configs:
        config._attn_implementation_internal = name  # type: ignore[union-attr]
    return bool(configs)


def asks_for_sdpa(model: nn.Module) -> bool:
    """Whether code of the model compares something with the name."""
    return any(_names_sdpa(cls) for module in model.modules() for cls in _own_classes(module))


def _own_classes(module: nn.Module) -> Iterator[Any]:
    """Of the model's file, not what all models have in common."""
    return (cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models."))


@cache
def _names_sdpa(cls: Any) -> bool:
    return any(_holds_sdpa(f.__code__) for f in vars(cls).values() if isinstance(f, FunctionType))


def _holds_sdpa(value: object) -> bool:
    """Whether the name is among the constants of code, however deep."""
    if isinstance(value, CodeType):
        value = value.co_consts
    return any(map(_holds_sdpa, value)) if isinstance(value, (tuple, frozenset)) else value == _SDPA
