"""Routers as a product and one operation, where models spell out softmax, top-k and what follows as eight.

Which modules are softmax over experts and its largest is found by trying, not by name: other families score by
sigmoids, add a bias, or choose groups first.

Letters: T tokens, D model dim, E experts, K experts a token.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monde.device.kernels import MAX_EXPERTS
from monde.device.kernels.step import can_choose, choose
from monde.models.gpu_dense import linear


class Choice(NamedTuple):
    """What a router does after its product. normalises: the scores of a token sum to one.

    score_dtype: None: that of the logits, whatever the model's type is by then.
    """

    num_topk: int
    normalises: bool
    score_dtype: torch.dtype | None


class _InOneLaunch:
    """Mixed into a router's class: (logits_TE, scores_TK, ids_TK), as the router gave them."""

    weight: Tensor
    _choice: Choice

    def forward(self, x: Tensor) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype is not self.weight.dtype:
            return super().forward(x)  # type: ignore[misc]
        logits_TE = linear(x.reshape(-1, self.weight.shape[1]), self.weight)
        num_topk, normalises, score_dtype = self._choice
        score_dtype = score_dtype or logits_TE.dtype
        if not can_choose(logits_TE, num_topk, score_dtype):
            return super().forward(x)  # type: ignore[misc]
        return logits_TE, *choose(logits_TE, num_topk, normalises, score_dtype)


def fuse_routers(model: nn.Module) -> int:
    """Let every router of the model that is a softmax and its largest choose at once; how many there were."""
    num_fused = 0
    for module in model.modules():
        choice = choice_of(module)
        if choice is not None:
            module._choice = choice  # type: ignore[assignment]
            cls: Any = type(module)
            module.__class__ = _with_one_launch(cls)
            num_fused += 1
    return num_fused


@functools.cache
def _with_one_launch(cls: Any) -> Any:
    return type(cls.__name__, (_InOneLaunch, cls), {"__module__": cls.__module__})


@torch.no_grad()
def choice_of(module: nn.Module) -> Choice | None:
    """Of modules that give (logits, scores, ids) of hidden states and have a weight_ED and nothing else; else None.

    Another weight than the model's is used, whose scores differ from expert to expert, in bf16, where scores in fp32 show.
    """
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    if isinstance(module, (_InOneLaunch, nn.Linear, nn.Embedding)) or list(tensors) != ["weight"]:
        return None
    weight = tensors["weight"]
    parameters = inspect.signature(module.forward).parameters
    if weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta or len(parameters) != 1:
        return None
    if len(weight) > MAX_EXPERTS or len(list(module.children())):
        return None
    generator = torch.Generator().manual_seed(0)
    E, D = weight.shape
    trial = (2 * torch.randn(E, D, generator=generator) * D**-0.5).to(weight.device, torch.bfloat16)
    x_TD = torch.randn(3, D, generator=generator).to(trial)
    kept = weight.data
    weight.data = trial
    try:
        found = module(x_TD)
    except Exception:  # whatever it takes, it is not this
        return None
    finally:
        weight.data = kept
    return _choice_that_gives(found, F.linear(x_TD, trial))


def _choice_that_gives(found: Any, logits_TE: Tensor) -> Choice | None:
    """Up to two roundings of the scores' type, and whichever of experts that score the same."""
    if not isinstance(found, tuple) or len(found) != 3 or not all(isinstance(y, Tensor) for y in found):
        return None
    logits, scores_TK, ids_TK = found
    if logits.dtype is not logits_TE.dtype or not torch.equal(logits, logits_TE):
        return None
    if ids_TK.dtype is not torch.int64 or ids_TK.ndim != 2:
        return None
    if scores_TK.shape != ids_TK.shape or ids_TK.shape[1] > logits_TE.shape[1]:
        return None
    p_TE = torch.softmax(logits_TE, -1, dtype=torch.float32)
    largest_TK, chosen_TK = p_TE.topk(ids_TK.shape[1]).values, p_TE.gather(1, ids_TK)
    if not torch.equal(largest_TK, chosen_TK):
        return None
    slack = 2 * torch.finfo(scores_TK.dtype).eps + 2**-20
    for normalises in (False, True):
        want_TK = largest_TK / largest_TK.sum(-1, keepdim=True) if normalises else largest_TK
        if torch.allclose(scores_TK.float(), want_TK, rtol=slack, atol=0):
            follows = scores_TK.dtype is logits_TE.dtype
            return Choice(ids_TK.shape[1], normalises, None if follows else scores_TK.dtype)
    return None
