"""Other attention functions for modules that would call torch's fused one; transformers finds them by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def replace_sdpa(model: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Let modules whose config says "sdpa" call `function`, with the masks of sdpa; other choices stay.

    The model gets configs of its own: another one made from the same config keeps torch's.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            module.config = copy.deepcopy(config, copies)  # type: ignore[assignment]
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation_internal = name  # type: ignore[union-attr]
