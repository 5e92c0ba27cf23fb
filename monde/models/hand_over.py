"""The last step of every way in: the model gets its engine, and what transformers asks of parameters stays answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from monde.engine import Engine
from monde.models.beside import CudaSide, run_shared_beside
from monde.models.decode_graph import install_on_gpu
from monde.models.deferral import defer_in_decode
from monde.models.experts import ExpertsModule
from monde.models.mesh import run_over_ranks
from monde.models.norms import fuse_norms
from monde.models.on_cpu import speed_up_on_cpu
from monde.models.on_gpu import speed_up_on_gpu
from monde.models.planned_size import watch_size
from monde.models.state_dict import refuse_state_dicts

_RUNS_IN = (torch.float32, torch.bfloat16, torch.float16)


def hand_over(model: Any, engine: Engine, modules: Sequence[ExpertsModule]) -> None:
    """Make `model`, whose experts are in `engine`, ready to run; `modules` have given up their parameters."""
    model.monde = engine
    if engine.ranked is None:
        install_on_gpu(model, engine)
    else:
        run_over_ranks(model, engine, engine.ranked.ranks)
        refuse_state_dicts(model, [module.name for module in modules])
    watch_size(model, engine)
    defer_in_decode(model, engine)
    fuse_norms(model)
    speed_up_on_gpu(model, engine.device)
    if engine.device.type == "cuda" and engine.ranked is None:
        run_shared_beside(model, modules, CudaSide(engine.device))
    speed_up_on_cpu(model, engine.device, engine.pool)
    taken = [param for module in modules for param in module.taken.values()]
    num_parameters = sum(math.prod(param.shape) for param in taken)
    num_bytes = sum(math.prod(param.shape) * param.dtype.itemsize for param in taken)
    # On the instance, as adapters do: a class of its own could not tell a copy, which is fine, from a pickle.
    model.num_parameters = partial(_num_parameters, model, num_parameters)
    model.get_memory_footprint = partial(_memory_footprint, model, num_bytes)
    model._apply = partial(_apply, model, engine.device)


def _num_parameters(
    model: Any, num_of_experts: int, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Experts are counted as before, although they are no parameters any more; but they cannot be trained."""
    others: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    return others if only_trainable else others + num_of_experts


def _memory_footprint(model: Any, bytes_of_experts: int, return_buffers: bool = True) -> int:
    others: int = type(model).get_memory_footprint(model, return_buffers)
    return others + bytes_of_experts


def _apply(model: Any, device: torch.device, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Behind `to`, `half`, `double`, `cuda` and their like: dense weights may change their type, nothing else.

    Errors: ValueError, before anything has changed, for a type or device that experts cannot be fed from.
    """
    after = change(torch.empty(0, device=device))
    if after.device != device or after.dtype not in _RUNS_IN:
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in _RUNS_IN)
        raise ValueError(
            f"monde runs this model on {device} in {types}, not on {after.device} in {after.dtype}; load it again: "
            "from_pretrained(..., device=..., dtype=...), or without monde"
        )
    return type(model)._apply(model, change, recurse)
