"""Expert deferral as far as it concerns the model: whether it can be, and which of its calls are decode steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monde.config import MondeConfig
from monde.engine import Engine
from monde.executors.deferral import DeferredSteps
from monde.models.experts import ExpertsModule
from monde.models.sizing import topk_of


def check_deferral(model_config: Any, modules: Sequence[ExpertsModule], config: MondeConfig) -> None:
    """Errors: ValueError where config asks for deferral and the model cannot have it."""
    wanted = config.deferred_experts
    if not wanted:
        return
    if model_config.is_encoder_decoder:
        raise ValueError("deferred_experts: encoder-decoders are run without it; leave it 0")
    num_topk = topk_of(model_config.get_text_config(), model_config)
    if num_topk is not None and wanted >= num_topk:
        raise ValueError(
            f"deferred_experts: expected 0..{num_topk - 1} for a model of {num_topk} experts per token, got {wanted}"
        )
    if any(module.tied for module in modules):
        raise ValueError(
            "deferred_experts: layers of this model share their experts, so that none is the next; leave it 0"
        )


class _DecodeSteps:
    """Hooks around a model's forward, which say where a step begins and ends.

    A decode step is a call with one new token a sequence and a cache to put it into; a prompt of one token counts too,
    for nothing tells it apart on the device.
    """

    def __init__(self, steps: DeferredSteps, forward_names: tuple[str, ...]) -> None:
        self._steps, self._forward_names = steps, forward_names

    # Dynamo would run these after the graph that they are about, so it must step around them.
    @torch.compiler.disable(reason="deferred_experts: compile the model or its forward, not what calls it")  # type: ignore[untyped-decorator]
    def enter(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._forward_names, args, strict=False)), **kwargs}
        new_BT = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        is_one = isinstance(new_BT, Tensor) and new_BT.dim() > 1 and new_BT.shape[1] == 1
        self._steps.begin(is_one and given.get("past_key_values") is not None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, model: Any, args: Any, outputs: Any) -> None:
        self._steps.end()

    def __deepcopy__(self, memo: dict[int, Any]) -> _DecodeSteps:
        return self


def defer_in_decode(model: Any, engine: Engine) -> None:
    """Let the engine know which calls of `model` are decode steps, where it defers at all."""
    if engine.deferred is not None:
        hooks = _DecodeSteps(engine.deferred, tuple(inspect.signature(model.forward).parameters))
        model.register_forward_pre_hook(hooks.enter, with_kwargs=True)
        model.register_forward_hook(hooks.leave)
