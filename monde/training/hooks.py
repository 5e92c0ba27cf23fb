"""Six places where a user's function may look at, or replace, what flows through a layer in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Hook = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Hooks:
    """Each takes a tensor and returns its replacement of equal shape, or None to leave it; gradients flow through.

    before_moe_start x[..., D], before_dispatch this rank's rows, after_dispatch and before_combine the rows of one
    chunk on the rank that computes them, after_combine this rank's rows, before_moe_end y[..., D].
    Names and places: FSMoE (arXiv 2501.10714). With experts cut along F (a mesh of two dims) before_combine sees one
    slice's part of a sum.
    """

    before_moe_start: Hook | None = None
    before_dispatch: Hook | None = None
    after_dispatch: Hook | None = None
    before_combine: Hook | None = None
    after_combine: Hook | None = None
    before_moe_end: Hook | None = None

    @property
    def inside(self) -> bool:
        """Whether some run on chunks: then backward has the chunks of forward."""
        return self.after_dispatch is not None or self.before_combine is not None


NO_HOOKS = Hooks()


def call(hook: Hook | None, name: str, x: Tensor) -> Tensor:
    """Errors: ValueError when a replacement has another shape or type."""
    if hook is None:
        return x
    y = hook(x)
    if y is None:
        return x
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(
            f"hook {name}: expected {tuple(x.shape)} of {x.dtype}, got {tuple(y.shape)} of {y.dtype}"
        )
    return y


class ChunkHook:
    """A hook inside the differentiable step: remembers each chunk's small graph for its backward."""

    def __init__(self, hook: Hook | None) -> None:
        self.hook = hook
        self.graphs: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_RD: Tensor) -> Tensor:
        if self.hook is None:
            return x_RD
        with torch.enable_grad():
            leaf = x_RD.detach().requires_grad_()
            y_RD = call(self.hook, "on a chunk", leaf)
        self.graphs.append((leaf, y_RD))
        return y_RD.detach()

    def backward(self, i: int, grad_RD: Tensor) -> Tensor:
        """Parameters that the hook uses get their gradients too."""
        if self.hook is None:
            return grad_RD
        leaf, y_RD = self.graphs[i]
        if y_RD is leaf:
            return grad_RD
        leaf.grad = None
        torch.autograd.backward(y_RD, grad_RD)
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
