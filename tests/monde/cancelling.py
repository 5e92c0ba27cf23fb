"""A text that whoever asked for it gives up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class Cancelled(RuntimeError):
    """Whoever asked for the text went away."""


class CancelAfter(StoppingCriteria):
    def __init__(self, num_tokens: int) -> None:
        self.left = num_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Cancelled
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
