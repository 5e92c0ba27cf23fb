"""Rotary embeddings as one operation each, where models spell them out as ten.

Attention modules call a function of their own file by its name. Those whose function turns queries and keys by halves,
which is found by trying, get a forward that finds another one under that name; other models keep theirs.

Letters: B sequences, T tokens, H heads, C dims of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from monde.device.kernels.step import can_rotate, rotate

_NAME = "apply_rotary_pos_emb"


def fuse_rotary(model: nn.Module) -> int:
    """Let every attention of the model that turns by halves do so at once; how many there were."""
    num_fused = 0
    for module in model.modules():
        cls: Any = type(module)
        plain = _function_of(cls)
        if plain is not None and turns_halves(plain):
            module.__class__ = _with_one_launch(cls)
            num_fused += 1
    return num_fused


def _function_of(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """What the class's forward calls under that name; None where it calls nothing, or has its own already."""
    forward = cls.forward
    if not isinstance(forward, FunctionType) or _NAME not in forward.__code__.co_names:
        return None
    function = forward.__globals__.get(_NAME)
    return None if isinstance(function, _InOneLaunch) else function


class _InOneLaunch:
    """Called like `plain`, with its results to the bit."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self._plain = plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """(q_BHTC, k_BNTC, cos_BTC, sin_BTC); whatever else models give goes to `plain`."""
        as_is = len(args) != 4 or kwargs or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if as_is or not can_rotate(*args):
            return self._plain(*args, **kwargs)
        return rotate(*args)


@functools.cache
def _with_one_launch(cls: Any) -> Any:
    """A subclass, by the same name, whose forward has globals in which the function is another one."""
    forward = cls.forward
    names = {**forward.__globals__, _NAME: _InOneLaunch(forward.__globals__[_NAME])}
    changed = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    for name in functools.WRAPPER_ASSIGNMENTS:
        setattr(changed, name, getattr(forward, name))
    return type(cls.__name__, (cls,), {"forward": changed, "__module__": cls.__module__})


@functools.cache
@torch.no_grad()
def turns_halves(function: Callable[..., Any]) -> bool:
    """Whether function(q, k, cos, sin) is x cos + (second half of x negated, first half) sin, to the bit."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = (torch.randn(2, heads, 3, 16, generator=generator).to(dtype) for heads in (4, 2))
        cos, sin = (torch.randn(2, 3, 16, generator=generator).to(dtype) for _ in range(2))
        try:
            found = function(q, k, cos, sin)
        except Exception:  # whatever it takes, it is not this
            return False
        want = [_turned(x, cos, sin) for x in (q, k)]
        if not isinstance(found, tuple) or len(found) != 2:
            return False
        if any(y.dtype is not dtype or not torch.equal(y, w) for y, w in zip(found, want, strict=True)):
            return False
    return True


def _turned(x_BHTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> Tensor:
    first, second = x_BHTC.chunk(2, -1)
    return x_BHTC * cos_BTC.unsqueeze(1) + torch.cat((-second, first), -1) * sin_BTC.unsqueeze(1)
