"""From a model's module to its layer: a plain call, or one opaque operator under torch.compile."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor

from monde.layer import Front

_NO_GRADIENT = (
    "monde runs experts for inference only: no gradient flows through them; "
    "use torch.no_grad(), or train the original model without monde"
)
_layers: weakref.WeakValueDictionary[int, Front] = weakref.WeakValueDictionary()
_next_layer_id = itertools.count()


class ExpertsHandle:
    """What an adapted module calls: experts(x_TD, topk_ids_TK, topk_weights_TK) -> y_TD.

    A copied module shares the experts of the original; pickling is refused.
    """

    def __init__(self, layer: Front) -> None:
        self.layer = layer
        self.layer_id = next(_next_layer_id)
        _layers[self.layer_id] = layer

    def __call__(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            y_TD: Tensor = torch.ops.monde.experts(x_TD, topk_ids_TK, topk_weights_TK, self.layer_id)
            return y_TD
        if torch.is_grad_enabled() and (x_TD.requires_grad or topk_weights_TK.requires_grad):
            guarded: Tensor = _ForwardOnly.apply(x_TD, topk_ids_TK, topk_weights_TK, self.layer)  # type: ignore[no-untyped-call]
            return guarded
        return self.layer.forward(x_TD, topk_ids_TK, topk_weights_TK)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertsHandle:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model run by monde cannot be pickled; use save_pretrained and load it again")


class _ForwardOnly(torch.autograd.Function):
    """Forward as usual, for dense parameters require gradients even in plain inference; backward refuses."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, layer: Front) -> Tensor:
        return layer.forward(x_TD, topk_ids_TK, topk_weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(_NO_GRADIENT)


# The layer synchronises with the host, so the operator must stay out of captured CUDA graphs.
@torch.library.custom_op("monde::experts", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _experts(x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, layer_id: int) -> Tensor:
    return _layers[layer_id].forward(x_TD, topk_ids_TK, topk_weights_TK)


@_experts.register_fake
def _(x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, layer_id: int) -> Tensor:
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format)


@torch.library.custom_op("monde::refuse_gradient", mutates_args=())
def _refuse_gradient(grad_TD: Tensor) -> Tensor:
    raise RuntimeError(_NO_GRADIENT)


@_refuse_gradient.register_fake
def _(grad_TD: Tensor) -> Tensor:
    return torch.empty_like(grad_TD)


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.monde.refuse_gradient(grad_TD), None, None, None


_experts.register_autograd(_backward)
