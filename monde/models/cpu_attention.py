"""Attention in bf16 on the CPU as matrix products, where torch's fused kernel is far from the machine.

Measured on two Zen 5 cores with torch 2.13, 32 query and 4 key-value heads of 128, one layer: one query on 512 keys
1.4 ms fused (2.6 with one thread) against 0.08; 512 queries causally on 512 keys 23 ms against 6. The arithmetic is
that of transformers' eager attention: products rounded to bf16, softmax in fp32. In fp32, and on CPUs without bf16
instructions, the fused kernel keeps up and stays.

Letters: B sequences, H query heads, KV key-value heads, G = H / KV, T queries, S keys, C dim of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from monde.models.attention import replace_sdpa
from monde.models.dense import cpu_multiplies_bf16

NAME = "monde_cpu"  # what config._attn_implementation says
BLOCK_ROWS = 1024  # query rows of all heads at once: their scores stay near the caches
MIN_BLOCK_QUERIES = 16


def speed_up_attention(model: nn.Module) -> None:
    """Let modules of a bf16 model that would call torch's fused attention call `attention`; other choices stay."""
    if cpu_multiplies_bf16() and any(param.dtype == torch.bfloat16 for param in model.parameters()):
        replace_sdpa(model, NAME, attention)


def attention(
    module: nn.Module,
    query_BHTC: Tensor,
    key_BKSC: Tensor,
    value_BKSC: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' contract of an attention function -> ([B, T, H, C], None).

    attention_mask: None, or [B or 1, H or 1, T, S], True where a query sees a key, or added to the scores.
    """
    if (
        query_BHTC.dtype != torch.bfloat16
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or dropout
        or kwargs.get("position_bias") is not None
        or kwargs.get("output_attentions")
    ):
        return sdpa_attention_forward(
            module, query_BHTC, key_BKSC, value_BKSC, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    B, H, T, C = query_BHTC.shape
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = is_causal and T > 1 and attention_mask is None
    if is_causal:  # as in sdpa_attention_forward: a mask-free call of several queries starts at the first key
        key_BKSC, value_BKSC = key_BKSC[:, :, :T], value_BKSC[:, :, :T]
    query_BHTC = query_BHTC * (C**-0.5 if scaling is None else scaling)
    y_BTHC = query_BHTC.new_empty(B, T, H, value_BKSC.shape[-1])
    num_queries = max(MIN_BLOCK_QUERIES, BLOCK_ROWS // (B * H))
    for begin in range(0, T, num_queries):
        end = min(T, begin + num_queries)
        num_keys = end if is_causal else key_BKSC.shape[2]
        block = _attend(
            query_BHTC[:, :, begin:end],
            key_BKSC[:, :, :num_keys],
            value_BKSC[:, :, :num_keys],
            _hidden_in_block(begin, end) if is_causal else _rows(attention_mask, begin, end),
        )
        y_BTHC[:, begin:end] = block.transpose(1, 2)
    return y_BTHC, None


def _attend(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, mask: Tensor | None) -> Tensor:
    """mask as of `attention`, or [T, T] for the last T keys. -> [B, H, T, C]."""
    B, H, T, C = q_BHTC.shape
    KV, S = k_BKSC.shape[1:3]
    q_RTC = q_BHTC.reshape(B * KV, H // KV * T, C)  # the heads of a group are more queries of its keys
    scores_RTS = torch.bmm(q_RTC, k_BKSC.reshape(B * KV, S, C).transpose(1, 2))
    scores_BHTS = scores_RTS.view(B, H, T, S)
    if mask is not None:
        _apply(mask, scores_BHTS)
    weights_RTS = torch.softmax(scores_RTS, -1, dtype=torch.float32).to(v_BKSC.dtype)
    y_RTC = torch.bmm(weights_RTS, v_BKSC.reshape(B * KV, S, -1))
    return y_RTC.view(B, H, T, -1)


def _apply(mask: Tensor, scores_BHTS: Tensor) -> None:
    if mask.dtype == torch.bool:
        # Not -inf: a query of padding that sees no key would turn NaN.
        lowest = torch.finfo(scores_BHTS.dtype).min
        scores_BHTS[..., scores_BHTS.shape[-1] - mask.shape[-1] :].masked_fill_(~mask, lowest)
    else:
        scores_BHTS += mask


def _hidden_in_block(begin: int, end: int) -> Tensor | None:
    """Earlier keys are all seen; among its own keys a block's queries see the triangle."""
    num = end - begin
    return torch.ones(num, num, dtype=torch.bool).tril() if num > 1 else None


def _rows(mask: Tensor | None, begin: int, end: int) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., begin:end, :]
