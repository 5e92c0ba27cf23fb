"""The experts' non-linearities in torch; the formulas are those of hostcompute.ActivationKind."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hostcompute import Activation, ActivationKind


def activate(activation: Activation, gate: Tensor, up: Tensor | None) -> Tensor:
    """act(gate) * up, or act(gate) when `up` is None (ungated). Shapes are equal and kept."""
    kind = activation.kind
    if kind in (ActivationKind.SWIGLU_CLAMP, ActivationKind.SWIGLU_ALPHA):
        assert up is not None
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    if kind is ActivationKind.SWIGLU_ALPHA:
        assert up is not None
        return gate * (activation.alpha * gate).sigmoid() * (up + 1)
    if kind is ActivationKind.SWIGLU_POST_CLAMP:
        assert up is not None
        return F.silu(gate).clamp(max=activation.limit) * up.clamp(-activation.limit, activation.limit)
    if kind is ActivationKind.SWIGLU_SOFTCAP:
        assert up is not None
        return _softcap(gate, activation.alpha) * gate.sigmoid() * _softcap(up, activation.limit)
    if kind in (ActivationKind.SILU, ActivationKind.SWIGLU_CLAMP):
        hidden = F.silu(gate)
    elif kind is ActivationKind.GELU_TANH:
        hidden = F.gelu(gate, approximate="tanh")
    elif kind is ActivationKind.GELU_ERF:
        hidden = F.gelu(gate)
    elif kind is ActivationKind.RELU:
        hidden = F.relu(gate)
    else:
        hidden = F.relu(gate).square()
    return hidden if up is None else hidden * up


def _softcap(x: Tensor, cap: float) -> Tensor:
    return cap * (x / cap).tanh()
