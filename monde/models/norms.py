"""RMS norms as one operation each, where models spell them out as eight.

In a captured decode step those small kernels cost more than the weights they stand between; on the CPU 512 rows of
2048 took 3.4 ms spelt out and 0.5 as one operation. Which modules compute exactly that is found by trying, not by
name: other families scale by 1 + weight, or round in between.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monde.device.kernels.step import can_normalise, normalise

_EPS_NAMES = ("variance_epsilon", "eps")


class FusedRMSNorm(nn.Module):
    """A model's own RMS norm, computed at once: weight * x / sqrt(mean(x^2) + eps), in fp32, rounded once.

    The model's rounds twice where x is bf16 or fp16, so results may differ by one rounding of that type.
    """

    weight: Tensor
    _plain: type[nn.Module]  # what the module was
    _eps: float

    def forward(self, x: Tensor) -> Any:
        if x.dtype != self.weight.dtype:
            return self._plain.forward(self, x)
        as_is = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if not as_is and can_normalise(x, self.weight):
            return normalise(x, self.weight, self._eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self._eps}"


def fuse_norms(model: nn.Module) -> int:
    """Let every RMS norm of the model compute at once; how many there were."""
    found: dict[tuple[type[nn.Module], float], bool] = {}
    num_fused = 0
    for module in model.modules():
        eps = _eps_of(module)
        if eps is None:
            continue
        kind = (type(module), eps)
        if kind not in found:
            found[kind] = _is_rms_norm(module, eps)
        if found[kind]:
            module._plain, module._eps = type(module), eps  # type: ignore[assignment]
            module.__class__ = FusedRMSNorm
            num_fused += 1
    return num_fused


def _eps_of(module: nn.Module) -> float | None:
    """Of modules of one argument whose one parameter is a vector called weight; None for all others."""
    if isinstance(module, (FusedRMSNorm, nn.RMSNorm, nn.LayerNorm)) or len(list(module.children())):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # a gate may come along
        return None
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    if list(tensors) != ["weight"]:
        return None
    weight = tensors["weight"]
    if weight.ndim != 1 or not weight.is_floating_point() or weight.is_meta:
        return None
    values = [getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)]
    return float(values[0]) if len(values) == 1 and isinstance(values[0], float) else None


@torch.no_grad()
def _is_rms_norm(module: nn.Module, eps: float) -> bool:
    """Whether it computes the formula, for inputs of usual size and for some as small as eps, where its place shows.

    Another weight than the model's is used: with all ones nobody could tell where it goes. Two roundings of the type
    are allowed, and one of fp32 for every input.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    generator = torch.Generator().manual_seed(0)
    trial = torch.rand(weight.shape, generator=generator).to(weight) + 0.5
    x = torch.randn(2, 1, len(weight), generator=generator)
    x[1] *= eps**0.5
    x = x.to(weight)
    kept = weight.data
    weight.data = trial
    try:
        y = module(x)
    finally:
        weight.data = kept
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return False
    exact = F.rms_norm(x.double(), trial.shape, trial.double(), eps)
    info = torch.finfo(weight.dtype)
    unit = info.eps + len(weight) * torch.finfo(torch.float32).eps
    least = info.smallest_normal * info.eps  # next to zero roundings are not relative
    return bool(((y.double() - exact).abs() <= 2 * (unit * exact.abs() + least)).all())
