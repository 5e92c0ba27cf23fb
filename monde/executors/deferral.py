"""Where a decode step stands whose layers leave pairs to the next one, and what they left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Left:
    """What a layer left to the next one: fp32 [T, D], to which `collect` adds what the host still owes, if anything."""

    sum_TD: Tensor
    collect: Callable[[Tensor], None] | None = None

    def whole_TD(self) -> Tensor:
        if self.collect is not None:
            self.collect(self.sum_TD)
            self.collect = None
        return self.sum_TD


@dataclass(frozen=True)
class Deferred:
    """A layer's output, with what the layer before left; and what it leaves itself, or None."""

    y_TD: Tensor
    left: Left | None


class DeferredSteps(threading.local):
    """One thread's step of the model: layers are called in order, each takes what the one before left.

    Outside a decode step nothing is deferred. What a step left that was cut short is dropped when the next begins.
    num_deferred: pairs of every token that a layer leaves, of the last of num_layers layers none.
    """

    def __init__(self, num_deferred: int, num_layers: int) -> None:
        self.num_deferred, self.num_layers = num_deferred, num_layers
        self._next_layer: int | None = None  # None: no decode step is under way
        self._left: Left | None = None

    def begin(self, is_decode: bool) -> None:
        """A step of the model begins."""
        self._next_layer, self._left = 0 if is_decode else None, None

    def enter(self, layer_idx: int) -> bool:
        """A layer is called; whether in a decode step. Errors: RuntimeError when it is not the next one."""
        if layer_idx == 0 and self._next_layer:
            self.begin(False)  # nobody said that this step begins, and the one before was cut short
        if self._next_layer is None:
            return False
        if layer_idx != self._next_layer:
            raise RuntimeError(
                f"deferred_experts: MoE layer {layer_idx} was called where layer {self._next_layer} was due, so pairs "
                "cannot be left to the next one; load the model with deferred_experts=0"
            )
        self._next_layer += 1
        return True

    def leaves(self, layer_idx: int) -> int:
        """Pairs of every token that the layer leaves to the next one."""
        return self.num_deferred if layer_idx < self.num_layers - 1 else 0

    def take(self) -> Left | None:
        """What the layer before left."""
        left, self._left = self._left, None
        return left

    def leave(self, left: Left | None) -> None:
        self._left = left

    def end(self) -> None:
        """All layers were called. Errors: RuntimeError when some were not, for then a contribution is missing."""
        reached, self._next_layer, self._left = self._next_layer, None, None
        if reached not in (None, self.num_layers):
            raise RuntimeError(
                f"deferred_experts: a decode step ended after {reached} of {self.num_layers} MoE layers, with pairs "
                "left over; load the model with deferred_experts=0"
            )
