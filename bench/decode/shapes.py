"""The models that are timed: true dimensions, and toys for machines without a GPU.

Letters: L layers, E experts, K top-k, D model dim, F expert hidden dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import MixtralConfig, OlmoeConfig, PretrainedConfig, Qwen3MoeConfig

MODELS = ("qwen3", "mixtral", "olmoe")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """What the arithmetic of bounds needs; E, K, D, F of every layer."""

    name: str
    num_layers: int
    full_layers: int
    num_experts: int
    num_topk: int
    d_model: int
    d_ffn: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.d_model * self.d_ffn * DTYPE.itemsize


def config_of(model: str, num_layers: int | None, toy: bool) -> PretrainedConfig:
    """Qwen3-30B-A3B, Mixtral-8x7B or OLMoE-1B-7B, with the number of layers that is asked for; toys have two."""
    common: dict[str, Any] = {"dtype": DTYPE, "tie_word_embeddings": False, "attn_implementation": "sdpa"}
    common |= {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    if model == "qwen3":
        dims: dict[str, Any] = {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "max_position_embeddings": 40960,
        }
        small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
        small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        small |= {"num_experts": 16, "num_experts_per_tok": 4}
        cls: Any = Qwen3MoeConfig
    elif model == "mixtral":
        dims = {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "max_position_embeddings": 32768,
        }
        small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        cls = MixtralConfig
    elif model == "olmoe":
        dims = {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "max_position_embeddings": 4096,
        }
        small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
        small |= {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 16,
            "num_experts_per_tok": 4,
        }
        cls = OlmoeConfig
    else:
        raise ValueError(f"--model: expected one of {', '.join(MODELS)}, got {model!r}")
    dims |= small if toy else {}
    if num_layers is not None:
        if not 1 <= num_layers <= 64:
            raise ValueError(f"--layers: expected 1 to 64, got {num_layers}")
        dims["num_hidden_layers"] = num_layers
    return cls(**common, **dims)


def shape_of(model: str, num_layers: int | None, toy: bool) -> Shape:
    config: Any = config_of(model, num_layers, toy)
    full: Any = config_of(model, None, toy)
    return Shape(
        name=f"{model} toy" if toy else model,
        num_layers=config.num_hidden_layers,
        full_layers=full.num_hidden_layers,
        num_experts=getattr(config, "num_experts", None) or config.num_local_experts,
        num_topk=config.num_experts_per_tok,
        d_model=config.hidden_size,
        d_ffn=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
    )
