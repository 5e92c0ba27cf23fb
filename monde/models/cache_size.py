"""What transformers' cache holds of a model, found by running the model where nothing is computed: on the meta device.

Configurations do not tell it: latent attention caches latents in one version and expanded keys and values in another,
hybrids have states instead of keys and values in most of their layers, indexers have keys of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from monde.models.experts import ExpertsModule

_FEW = 2  # tokens, fewer than any window of attention


@dataclass(frozen=True)
class CacheSize:
    """Bytes of all layers: for each token of a sequence, and for a sequence of any length. A window counts in full."""

    per_token_bytes: int
    per_sequence_bytes: int


_known: dict[tuple[type, str, int], CacheSize | None] = {}  # a plan asks for every format


def cache_size(model: Any, modules: Sequence[ExpertsModule]) -> CacheSize | None:
    """None for models that do not run on the meta device, and for those that return no cache.

    Takes about a second for a hundred layers, once for each configuration and size of its numbers.
    """
    key = (type(model), model.config.to_json_string(), model.dtype.itemsize)
    if key not in _known:
        _known[key] = _tried(model, modules)
    return _known[key]


def _tried(model: Any, modules: Sequence[ExpertsModule]) -> CacheSize | None:
    try:
        twin = _without_weights(model, modules)
        few_bytes, more_bytes = (_cache_bytes(twin, num_tokens) for num_tokens in (_FEW, _FEW + 1))
    except Exception:  # whatever a forward does that needs numbers
        return None
    per_token_bytes = more_bytes - few_bytes
    return CacheSize(per_token_bytes, few_bytes - _FEW * per_token_bytes) if few_bytes else None


def _without_weights(model: Any, modules: Sequence[ExpertsModule]) -> Any:
    """The same model on the meta device; its experts return nothing but the right shape."""
    with torch.device("meta"):
        twin = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype).eval()
    for module in modules:
        for path, _ in module.places():
            module.adapter.attach(twin.get_submodule(path), _no_experts)
    return twin


def _no_experts(x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    return torch.empty_like(x_TD)


@torch.no_grad()
def _cache_bytes(twin: Any, num_tokens: int) -> int:
    """Of one sequence; 0 where there is no cache."""
    with torch.device("meta"):
        ids_BT = torch.zeros(1, num_tokens, dtype=torch.long)
        inputs = {"input_ids": ids_BT}
        if twin.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids_BT
        cache = getattr(twin(**inputs, use_cache=True), "past_key_values", None)
    return _held_bytes(cache, set()) if isinstance(cache, Cache) else 0


def _held_bytes(part: Any, seen: set[int]) -> int:
    """Of every tensor in a cache, whatever its layers call them."""
    if id(part) in seen:
        return 0
    seen.add(id(part))
    if isinstance(part, Tensor):
        return part.nbytes
    if isinstance(part, dict):
        return sum(_held_bytes(value, seen) for value in part.values())
    if isinstance(part, list | tuple):
        return sum(_held_bytes(value, seen) for value in part)
    module = type(part).__module__
    return (
        _held_bytes(vars(part), seen)
        if module.startswith("transformers.") and hasattr(part, "__dict__")
        else 0
    )
