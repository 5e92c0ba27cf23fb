"""The longest sequence and largest batch that the memory plan was made for: a model used beyond them says so once.

It warns and goes on. That the budget breaks is likely, not certain: what is asked of generate is an upper bound, and
the plan counts a workspace that few prompts need in full. Nothing is looked at but shapes, where Python runs anyway: at
the start of a generation and of an eager forward, never in a captured step.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from monde.engine import Engine

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids")


class PlannedSize:
    """budget: the setting that promises what the plan keeps. Positions are sequences times tokens of each."""

    def __init__(self, max_context: int, max_batch: int, budget: str) -> None:
        self.max_context, self.max_batch, self.budget = max_context, max_batch, budget
        self._has_warned = False

    def see(self, num_rows: int, num_tokens: int) -> None:
        """So many sequences of so many tokens, those in the cache included."""
        if self._has_warned or num_rows * num_tokens <= self.max_context * self.max_batch:
            return
        self._has_warned = True
        give = {"max_context": (num_tokens, self.max_context), "max_batch": (num_rows, self.max_batch)}
        wanted = ", ".join(f"{name}={used}" for name, (used, planned) in give.items() if used > planned)
        warnings.warn(
            f"{self.budget} was planned for max_context={self.max_context}, max_batch={self.max_batch} and may be "
            f"exceeded: {num_rows} x {num_tokens} positions are asked for; load the model with {wanted}",
            RuntimeWarning,
            stacklevel=3,
        )

    def before_forward(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A hook of the model. Lengths on the device, as a static cache has them, are not read: its room counts."""
        if self._has_warned or torch.compiler.is_compiling():
            return
        inputs = next(
            (t for name in _INPUTS if (t := kwargs.get(name)) is not None), args[0] if args else None
        )
        if isinstance(inputs, Tensor) and inputs.dim() > 1:
            self.see(inputs.shape[0], _num_tokens(inputs.shape[1], kwargs.get("past_key_values")))


def watch_size(model: Any, engine: Engine) -> None:
    """Where the plan is a promise: on a GPU, whose memory it fills, and under a host_memory."""
    config = engine.config
    if engine.device.type != "cuda" and config.host_memory is None:
        return
    budget = "gpu_memory" if engine.device.type == "cuda" else "host_memory"
    planned = PlannedSize(config.max_context, config.max_batch, budget)
    model.register_forward_pre_hook(planned.before_forward, with_kwargs=True)
    model._prepare_cache_for_generation = partial(_prepare_cache, model, planned)


def _prepare_cache(
    model: Any,
    planned: PlannedSize,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    mode: Any,
    num_rows: int,
    num_tokens: int,
) -> Any:
    """transformers calls it once a generation, with all its tokens, before anything is allocated."""
    num_sequences = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    planned.see(num_rows * num_sequences, num_tokens)
    return type(model)._prepare_cache_for_generation(
        model, generation_config, model_kwargs, mode, num_rows, num_tokens
    )


def _num_tokens(num_new: int, cache: Any) -> int:
    first = next(iter(getattr(cache, "layers", ())), None)
    room = getattr(first, "max_cache_len", None)
    if isinstance(room, int):
        return max(num_new, room)
    keys = getattr(first, "keys", None)
    held = keys.shape[-2] if isinstance(keys, Tensor) and keys.dim() > 2 else 0
    return num_new + held
