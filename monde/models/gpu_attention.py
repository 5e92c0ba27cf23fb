"""Attention of decode steps on a GPU: one query over the keys that it sees, read once for all heads that share them.

What torch's fused function makes of a static cache is several times as much: transformers repeats keys and values for
every query head first, and all positions that the cache has room for are read. Prompts stay with torch.

Letters: B sequences, H query heads, N key-value heads, S keys, C dims of a key, V dims of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from monde.device.kernels.attention import DTYPES, attend, can_attend
from monde.models.attention import replace_sdpa

NAME = "monde_gpu"  # what config._attn_implementation says


def speed_up_decode_attention(model: nn.Module, device: torch.device) -> None:
    """Nothing where the GPU lacks the products that the kernel has, or no part of the model is half wide."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return
    if any(param.dtype in DTYPES for param in model.parameters()):
        replace_sdpa(model, NAME, attention)


def attention(
    module: nn.Module,
    query_BHTC: Tensor,
    key_BNSC: Tensor,
    value_BNSV: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' contract of an attention function -> ([B, T, H, V], None)."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or dropout
        or kwargs.get("position_bias") is not None
        or kwargs.get("output_attentions")
        or not can_attend(query_BHTC, key_BNSC, value_BNSV, attention_mask)
    ):
        return sdpa_attention_forward(
            module, query_BHTC, key_BNSC, value_BNSV, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    scale = query_BHTC.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query_BHTC, key_BNSC, value_BNSV, attention_mask, scale), None
