"""Tiny random models of five families with different checkpoint layouts, and how close is close enough."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

NAMES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe")


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in eval mode; the same weights at every call."""
    torch.manual_seed(0)
    model = _BUILDERS[name]()
    with torch.no_grad():
        for param in model.parameters():
            # Default initialisation is so small that experts would hardly move the logits.
            if param.dim() > 1:
                param.mul_(4)
            else:
                param.add_(torch.randn_like(param) * 0.05)
    return model.to(dtype).eval()


def _qwen3_moe() -> Any:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_COMMON, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, head_dim=8)
    )


def _mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2))


def _gpt_oss() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return GptOssForCausalLM(
        GptOssConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=8, rope_parameters=rope)
    )


def _deepseek_v3() -> Any:
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_COMMON | {"num_key_value_heads": 4, "num_hidden_layers": 3},
            moe_intermediate_size=24,
            n_routed_experts=8,
            num_experts_per_tok=4,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    )


def _olmoe() -> Any:
    return OlmoeForCausalLM(OlmoeConfig(**_COMMON, num_experts=8, num_experts_per_tok=2))


_BUILDERS = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "olmoe": _olmoe,
}


def dense() -> Any:
    """A model without experts."""
    return Qwen3ForCausalLM(Qwen3Config(**_COMMON, head_dim=8))


def prompt(batch: int = 2, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


@dataclass(frozen=True)
class Expected:
    """The logits of the original model, and how far rounding alone may move them."""

    logits: Tensor
    tolerance: float


def expected(model: Any, ids: Tensor, **inputs: Any) -> Expected:
    """Run `model` in its own precision and in float64.

    Two correct evaluations differ from the exact result by about the same rounding error. Experts summed in
    another order are another draw from the same distribution; 8 such errors, plus 8 units in the last place
    of the
    largest logit for models where the original happens to be exact, leave room for the draw and none for a
    wrong
    formula.
    """
    with torch.no_grad():
        logits = model(ids, **inputs).logits
        exact = in_float64(model)(ids, **inputs).logits
    rounding = float((logits.double() - exact).abs().max())
    ulp = torch.finfo(logits.dtype).eps * float(exact.abs().max())
    return Expected(logits, 8 * (rounding + ulp))


def in_float64(model: Any) -> Any:
    """A copy of `model` in float64; only transformers' eager experts run in that type."""
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")
    return double


def assert_logits(got: Tensor, want: Expected) -> None:
    """Errors: AssertionError with the worst element and where it is."""
    error = (got.double() - want.logits.double()).abs()
    worst = int(error.argmax())
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    message = f"worst at {position}: got {got.flatten()[worst]}, want {want.logits.flatten()[worst]}"
    assert float(error.max()) <= want.tolerance, f"{message}, allowed {want.tolerance:.3g}"
    assert float(want.tolerance) < 1e-2 * float(want.logits.abs().max()), (
        "the tolerance would hide a wrong formula"
    )


def greedy(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    mask = torch.ones_like(ids)
    tokens: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **kwargs)
    return tokens
