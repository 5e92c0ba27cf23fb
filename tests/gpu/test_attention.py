"""Attention of one query on the GPU: near the exact answer whatever the shape, and of what is seen alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

import monde
from monde.models.gpu_attention import NAME, attention
from tests.monde import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from monde.device.kernels.attention import attend, can_attend, num_splits

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [  # B, H, N, S, C, V
    (1, 32, 4, 4096, 128, 128),
    (3, 8, 8, 33, 64, 64),
    (2, 16, 1, 1000, 128, 128),
    (1, 40, 2, 129, 64, 64),
    (2, 6, 2, 700, 192, 128),
    (1, 4, 4, 1, 256, 256),
    (5, 12, 4, 257, 80, 80),
    (2, 4, 2, 300, 24, 16),
    (64, 8, 2, 131, 128, 128),
    (1, 24, 2, 20000, 96, 96),
]


def states(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, 1, C], k [B, N, S, C], v [B, N, S, V]; scores are spread enough for weights to differ."""
    B, H, N, S, C, V = shape
    generator = torch.Generator("cuda").manual_seed(sum(shape))

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device="cuda").to(dtype)

    return 2 * random(B, 1, H, C).transpose(1, 2), random(B, N, S, C), random(B, N, S, V)


def seen(kind: str, B: int, S: int) -> Tensor | None:
    generator = torch.Generator("cuda").manual_seed(B + S)
    if kind == "none":
        return None
    if kind == "holes":
        mask = torch.rand(B, 1, 1, S, generator=generator, device="cuda") < 0.5
    else:  # a cache with room, behind padding on the left, as static caches have them
        place = torch.arange(S, device="cuda")
        mask = ((place >= S // 5) & (place < max(S // 5 + 1, S // 2))).expand(1, 1, 1, S).clone()
    mask[..., S // 5] = True
    return mask


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(float64 answer, bound of the kernel's distance from it), both [B, 1, H, V].

    Scores are sums of C exact products in fp32; weights are rounded to the type before they meet values, fp16 to no
    less than 2^-24 of the greatest; the answer is rounded once.
    """
    half, (B, H, _, C), S = torch.finfo(q.dtype).eps / 2, q.shape, k.shape[2]
    num_shared = H // k.shape[1]
    q, k, v = q.double() * scale, *(x.double().repeat_interleave(num_shared, 1) for x in (k, v))
    scores, terms = q @ k.transpose(2, 3), q.abs() @ k.abs().transpose(2, 3)
    hidden = torch.zeros_like(scores, dtype=torch.bool) if mask is None else ~mask.expand(B, H, 1, S)
    moved = (terms * (C + 4) * 2**-24).masked_fill(hidden, 0).amax(-1, keepdim=True)
    factor = torch.expm1(2 * moved) + 2 * half + S * 2**-23
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    want = (weights @ v).transpose(1, 2)
    shown = v.abs().masked_fill(hidden.transpose(2, 3), 0)
    bound = ((weights * factor) @ shown).transpose(1, 2) + half * want.abs()
    return want, bound + 2**-24 * shown.sum(2).unsqueeze(1) + 2**-30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "holes", "room"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_near_the_exact_answer(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    (q, k, v), mask = states(shape, dtype), seen(kind, shape[0], shape[3])
    assert can_attend(q, k, v, mask)
    y = attend(q, k, v, mask, 0.1)
    want, bound = exact(q, k, v, mask, 0.1)
    assert y.dtype == dtype
    assert y.shape == want.shape
    assert ((y.double() - want).abs() <= bound).all(), ((y.double() - want).abs() / bound).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_seen_may_be_anything(dtype: torch.dtype) -> None:
    q, k, v = states((2, 8, 2, 777, 128, 128), dtype)
    mask = seen("holes", 2, 777)
    assert mask is not None
    want = attend(q, k, v, mask, 0.1)
    hidden = ~mask.transpose(2, 3)
    for nonsense in (torch.nan, torch.inf):
        y = attend(q, k.masked_fill(hidden, nonsense), v.masked_fill(hidden, nonsense), mask, 0.1)
        assert torch.equal(y, want)


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_that_is_seen_shows(where: str) -> None:
    q, k, v = states((1, 8, 2, 300, 64, 64), torch.bfloat16)
    {"query": q[0, 3, 0], "key": k[0, 0, 200], "value": v[0, 0, 200]}[where][:8] = torch.nan
    y = attend(q, k, v, None, 0.1)
    assert y[0, 0, 3].isnan().any()
    assert y[0, 0, 4:].isfinite().all()


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    q, k, v = states((2, 8, 2, 300, 64, 64), torch.bfloat16)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool, device="cuda")
    mask[1] = False
    y = attend(q, k, v, mask, 0.1)
    assert (y[1] == 0).all()
    assert torch.equal(y[:1], attend(q[:1], k[:1], v[:1], None, 0.1)) or y[0].isfinite().all()


def test_parts_of_larger_tensors() -> None:
    """Strided keys and values, as a cache of more sequences and heads has them."""
    q, k, v = states((4, 8, 4, 200, 64, 64), torch.bfloat16)
    y = attend(q[1:3, 2:6], k[1:3, 1:3, 30:190], v[1:3, 1:3, 30:190], None, 0.1)
    want = attend(q[1:3, 2:6].contiguous(), *(x[1:3, 1:3, 30:190].contiguous() for x in (k, v)), None, 0.1)
    assert torch.equal(y, want)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, m: (q.float(), k.float(), v.float(), m),
        lambda q, k, v, m: (q.expand(-1, -1, 2, -1), k, v, m),
        lambda q, k, v, m: (q[..., :20], k[..., :20], v, m),
        lambda q, k, v, m: (q, k[..., 1:, :], v[..., 1:, :], m.float()[..., 1:]),
        lambda q, k, v, m: (q, k, v, m.expand(-1, 8, -1, -1)),
        lambda q, k, v, m: (q, k, v, m.cpu()),
        lambda q, k, v, m: (q, k[:1], v[:1], m),
        lambda q, k, v, m: (q, k, v[:, :, 1:], m),
        lambda q, k, v, m: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v, m),
    ],
)
def test_the_rest_is_left_to_torch(change: Any) -> None:
    q, k, v = states((2, 8, 2, 40, 64, 64), torch.bfloat16)
    mask = seen("holes", 2, 40)
    assert can_attend(q, k, v, mask)
    assert not can_attend(*change(q, k, v, mask))


@pytest.mark.parametrize("why", ["gradients", "dropout", "a prompt"])
def test_attention_of_other_calls_is_torchs(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = states((2, 8, 2, 40, 64, 64), torch.bfloat16)
    layer = nn.Module()
    layer.num_key_value_groups = 4  # type: ignore[assignment]
    monkeypatch.setattr("monde.models.gpu_attention.attend", None)
    if why == "a prompt":
        q = q.expand(-1, -1, 40, -1)
    with torch.set_grad_enabled(why == "gradients"):
        y, _ = attention(layer, q, k, v, None, dropout=0.5 if why == "dropout" else 0.0)
    assert y.shape == (2, q.shape[2], 8, 64)


@pytest.mark.parametrize(("num_keys", "num_blocks"), [(1, 1), (128, 4), (4096, 4), (10**6, 4), (4096, 4096)])
def test_splits_share_out_whole_blocks_of_keys(num_keys: int, num_blocks: int) -> None:
    splits = num_splits(num_keys, num_blocks, 132)
    assert 1 <= splits <= math.ceil(num_keys / 128)
    assert splits == 1 or num_blocks * (splits - 1) < 4 * 132


@torch.inference_mode()
@pytest.mark.parametrize("length", [9, 200])
def test_steps_of_a_model_are_as_near_as_with_torchs_attention(length: int) -> None:
    """Prompts with padding, then given tokens: mean distance from the same model in fp32."""
    original = tiny.build("qwen3_moe", torch.bfloat16).cuda()
    wide = tiny.build("qwen3_moe", torch.bfloat16).float().cuda()
    ids = torch.randint(3, tiny.VOCABULARY, (3, length + 20), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0

    def logits(model: Any) -> Tensor:
        cache, found = StaticCache(config=model.config, max_cache_len=length + 40), []
        for begin, end in ((0, length), *((i, i + 1) for i in range(length, length + 20))):
            positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:end]
            y = model(
                ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions, past_key_values=cache
            )
            found.append(y.logits[:, -1].float())
        return torch.stack(found[1:])

    want = logits(wide)
    theirs = (logits(original) - want).abs().mean()
    model = monde.offload(original, gpu_memory="1GiB", max_batch=3, max_context=length + 40)
    assert model.config._attn_implementation == NAME
    assert (logits(model) - want).abs().mean() <= 1.5 * theirs
    model.monde.close()
