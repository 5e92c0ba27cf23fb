"""Dense layers of decode steps of one token on a GPU, at the rate that their weights are read.

For matrices of some megabytes libraries take longer: their tiles are made for many tokens. On an H200 the five products
of a block of Qwen3-30B-A3B took 31 us, and reading their weights takes 9.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monde.device.kernels.step import can_project, project


class StepLinear(nn.Linear):
    """An nn.Linear, whose single tokens are multiplied by monde's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, whoever computes it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not can_project(x, weight, bias):
        return F.linear(x, weight, bias)
    return project(x, weight, bias)


def speed_up_dense_steps(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = StepLinear
