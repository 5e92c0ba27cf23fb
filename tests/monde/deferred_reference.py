"""Expert deferral in plain torch, around a model's own experts: the slow twin of monde's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DeferredReference:
    """Patches every experts module of a transformers model, which then defers in calls of `step`, not of `prompt`."""

    def __init__(self, model: Any, num_deferred: int) -> None:
        self.model, self.num_deferred = model, num_deferred
        self.is_decode, self.left_TD = False, None
        experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
        for module in experts:
            module.forward = self._around(module.forward, is_last=module is experts[-1])

    def _around(self, experts: Callable[..., Tensor], is_last: bool) -> Callable[..., Tensor]:
        def forward(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            if not self.is_decode:
                return experts(x_TD, ids_TK, weights_TK)
            now_TK, later_TK = weights_TK.clone(), torch.zeros_like(weights_TK)
            for t, weights in enumerate(weights_TK.tolist()):
                by_weight = sorted(range(len(weights)), key=lambda k: (-weights[k], k))
                for k in by_weight[len(weights) - self.num_deferred :] if not is_last else []:
                    now_TK[t, k], later_TK[t, k] = 0, weights[k]
            y_TD = experts(x_TD, ids_TK, now_TK)
            if self.left_TD is not None:
                y_TD = y_TD + self.left_TD
            self.left_TD = None if is_last else experts(x_TD, ids_TK, later_TK)
            return y_TD

        return forward

    def prompt(self, ids_BT: Tensor, **inputs: Any) -> Any:
        self.is_decode, self.left_TD = False, None
        return self.model(ids_BT, use_cache=True, **inputs)

    def step(self, ids_B1: Tensor, **inputs: Any) -> Any:
        assert ids_B1.shape[1] == 1
        self.is_decode, self.left_TD = True, None
        return self.model(ids_B1, use_cache=True, **inputs)
