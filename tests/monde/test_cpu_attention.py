"""Attention in bf16 on the CPU: eager attention's arithmetic, whatever the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import monde
from monde.models import cpu_attention as module_under_test
from monde.models.cpu_attention import NAME, attention
from tests.monde import tiny


class Layer(nn.Module):
    is_causal = True

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_groups


def states(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, ...]:
    B, H, KV, T, S, C = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return tuple(
        torch.randn(B, length, heads, C, generator=generator).to(dtype).transpose(1, 2)
        for heads, length in ((H, T), (KV, S), (KV, S))
    )


def masks(kind: str, B: int, T: int, S: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(B + T + S)
    if kind == "none":
        return None
    triangle = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    holes = torch.rand(B, 1, 1, S, generator=generator) < 0.8
    holes[..., 0] = True  # every query sees a key
    if kind == "bool":
        return triangle & holes
    if kind == "one row":
        return holes
    return torch.where(triangle & holes, torch.randn(B, 1, T, S, generator=generator), -torch.inf).bfloat16()


def exact(
    layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """(float64 answer, its greatest distance from that of eager arithmetic), both [B, T, H, C].

    Scores are rounded to bf16 after the scaled query and, with an added mask, once more; weights are rounded too:
    a weight moves by the factor exp(+-2 d) at most, d the greatest error of a score in its row.
    """
    k, v = (x.double().repeat_interleave(layer.num_key_value_groups, 1) for x in (k, v))
    scores = q.double() * scaling @ k.transpose(2, 3)
    terms = (q.double() * scaling).abs() @ k.abs().transpose(2, 3)
    T, S = scores.shape[2:]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if T > 1 else torch.ones(1, S, dtype=torch.bool)
    added = torch.zeros(mask.shape, dtype=torch.float64) if mask.dtype == torch.bool else mask.double()
    if mask.dtype == torch.bool:
        added = added.masked_fill(~mask, -torch.inf)
    seen = (scores + added).masked_fill(added == -torch.inf, 0).abs()
    slack = torch.where(added == -torch.inf, 0.0, terms * 2**-8 + (scores.abs() + seen) * 2**-8)
    moved = torch.expm1(2 * slack.amax(-1, keepdim=True)) + 2**-7
    weights = torch.softmax(scores + added, -1)
    return (weights @ v).transpose(1, 2), ((weights * moved) @ v.abs()).transpose(1, 2)


@pytest.mark.parametrize("kind", ["none", "bool", "one row", "float"])
@pytest.mark.parametrize(
    "shape",  # B, H, KV, T, S, C
    [
        (1, 8, 2, 1, 33, 16),
        (2, 4, 4, 3, 3, 8),
        (2, 8, 1, 70, 70, 24),
        (3, 6, 3, 5, 40, 16),
        (1, 4, 2, 0, 7, 16),
        (1, 64, 8, 50, 50, 8),
    ],
    ids=str,
)
def test_near_the_exact_answer(shape: tuple[int, int, int, int, int, int], kind: str) -> None:
    B, H, KV, T, S, _ = shape
    if kind == "none" and T > 1 and T != S:
        pytest.skip("transformers gives a mask where several queries follow earlier keys")
    layer, (q, k, v), mask = Layer(H // KV), states(shape), masks(kind, B, T, S)
    with torch.inference_mode():
        y, weights = attention(layer, q, k, v, mask, scaling=0.3)
    want, bound = exact(layer, q, k, v, mask, 0.3)
    assert weights is None
    assert y.dtype == torch.bfloat16
    assert y.shape == want.shape
    assert ((y.double() - want).abs() <= bound + 2**-8 * want.abs()).all()


def test_a_query_that_sees_nothing_is_finite() -> None:
    q, k, v = states((1, 4, 2, 3, 5, 16))
    with torch.inference_mode():
        y, _ = attention(Layer(2), q, k, v, torch.zeros(1, 1, 3, 5, dtype=torch.bool))
    assert y.isfinite().all()


def test_an_empty_static_cache_is_not_seen() -> None:
    """Several queries without a mask are the first keys: what lies behind them is not there yet."""
    q, k, v = states((1, 4, 2, 6, 6, 16))
    room = torch.full((1, 2, 10, 16), torch.nan, dtype=torch.bfloat16)
    with torch.inference_mode():
        y, _ = attention(Layer(2), q, torch.cat([k, room], 2), torch.cat([v, room], 2), None)
        want, _ = attention(Layer(2), q, k, v, None)
    assert torch.equal(y, want)


@pytest.mark.parametrize("why", ["float32", "gradients", "dropout"])
def test_the_rest_is_left_to_torch(why: str) -> None:
    q, k, v = states((1, 4, 2, 3, 3, 16), torch.float32 if why == "float32" else torch.bfloat16)
    arguments: dict[str, Any] = {"dropout": 0.5 if why == "dropout" else 0.0}
    with torch.set_grad_enabled(why == "gradients"):
        torch.manual_seed(0)
        y, _ = attention(Layer(2), q, k, v, None, **arguments)
        torch.manual_seed(0)
        want, _ = sdpa_attention_forward(Layer(2), q, k, v, None, **arguments)
    assert torch.equal(y, want)


def test_not_causal() -> None:
    q, k, v = states((1, 4, 2, 6, 6, 16))
    with torch.inference_mode():
        y, _ = attention(Layer(2), q, k, v, None, is_causal=False)
        want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=True).transpose(
            1, 2
        )
    assert torch.allclose(y.float(), want, atol=0.03)


@pytest.mark.parametrize("bf16_cpu", [True, False])
@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_only_fused_attention_of_bf16_cpus_is_replaced(
    bf16_cpu: bool, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "cpu_multiplies_bf16", lambda: bf16_cpu)
    original = tiny.build("qwen3_moe", torch.bfloat16)
    original.set_attn_implementation(asked)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    with torch.inference_mode():
        want = original(ids, attention_mask=mask).logits
        model = monde.offload(original, device="cpu")
        y = model(ids, attention_mask=mask).logits
    assert model.config._attn_implementation == (NAME if bf16_cpu and asked == "sdpa" else asked)
    assert torch.allclose(y[mask == 1].float(), want[mask == 1].float(), atol=0.05)
