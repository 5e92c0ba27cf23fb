"""Which non-linearity a module applies, found by calling it: names and attributes differ between families."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hostcompute import Activation, ActivationKind
from monde.executors.activations import activate

_LIMIT_NAMES = ("limit", "swiglu_limit", "act_fn.up_softcap.softcap")
_ALPHA_NAMES = ("alpha", "swiglu_alpha", "act_fn.gate_softcap.softcap")
_PLAIN_KINDS = (
    ActivationKind.SILU,
    ActivationKind.GELU_TANH,
    ActivationKind.GELU_ERF,
    ActivationKind.RELU,
    ActivationKind.RELU2,
)
_SWIGLU_KINDS = tuple(kind for kind in ActivationKind if kind not in _PLAIN_KINDS)


def detect_gated(act: Callable[[Tensor, Tensor], Tensor], module: nn.Module) -> Activation:
    """The activation equal to `act(gate, up)` on a probe that reaches past the module's clamp limit.

    Errors: ValueError when no supported non-linearity gives the same values.
    """
    limit, alpha = _constant(module, _LIMIT_NAMES, float("inf")), _constant(module, _ALPHA_NAMES, 1.702)
    candidates = [Activation(kind) for kind in _PLAIN_KINDS]
    candidates += [
        Activation(kind, limit, alpha)
        for kind in _SWIGLU_KINDS
        if kind is not ActivationKind.SWIGLU_SOFTCAP or math.isfinite(limit)
    ]
    reach = 2 * limit if 0 < limit < 1e3 else 10.0
    line = torch.linspace(-reach, reach, 41, dtype=torch.float32)
    gate, up = line.repeat(41), line.repeat_interleave(41)
    return _only_match(act(gate, up), ((c, activate(c, gate, up)) for c in candidates), module)


def detect_ungated(act: Callable[[Tensor], Tensor], module: nn.Module) -> Activation:
    """The activation equal to `act(up)` of an ungated expert. Errors: as detect_gated."""
    line = torch.linspace(-10, 10, 401, dtype=torch.float32)
    return _only_match(
        act(line), ((Activation(k), activate(Activation(k), line, None)) for k in _PLAIN_KINDS), module
    )


def _only_match(
    wanted: Tensor, candidates: Iterator[tuple[Activation, Tensor]], module: nn.Module
) -> Activation:
    # GELU's two forms differ by up to 5e-4, so 1e-5 of the largest value tells every pair of kinds apart.
    tolerance = 1e-5 * float(wanted.abs().max())
    for candidate, values in candidates:
        if float((values - wanted).abs().max()) <= tolerance:
            return candidate
    kinds = ", ".join(kind.value for kind in ActivationKind)
    raise ValueError(f"{type(module).__name__}: its activation is none of those supported ({kinds})")


def _constant(module: Any, names: tuple[str, ...], default: float) -> float:
    for name in names:
        value = module
        for part in name.split("."):
            value = getattr(value, part, None)
        if isinstance(value, int | float):
            return float(value)
    return default
