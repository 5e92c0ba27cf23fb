"""The small operations of a decode step: kernels against torch's, to the bit where the arithmetic is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StaticCache

import monde
from monde.models.decode_cache import StepLayer, static_cache
from monde.models.rotary import _turned
from tests.monde import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from monde.device.kernels.step import (
        append,
        can_append,
        can_choose,
        can_normalise,
        can_project,
        can_rotate,
        choose,
        normalise,
        project,
        rotate,
    )

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(sizes))
    return torch.randn(sizes, generator=generator, device="cuda").to(dtype)


# ---- rotate ----
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("angle_rows", ["one", "every"])
@pytest.mark.parametrize(
    "shape",  # B, H, N, T, C
    [(1, 32, 4, 1, 128), (3, 4, 4, 7, 64), (16, 8, 1, 1, 16), (2, 5, 3, 130, 80), (1, 1, 1, 1, 256)],
    ids=str,
)
def test_rotate_is_torchs_to_the_bit(shape: tuple[int, ...], angle_rows: str, dtype: torch.dtype) -> None:
    B, H, N, T, C = shape
    q, k = (random(B, T, heads, C, dtype=dtype).transpose(1, 2) for heads in (H, N))
    cos, sin = (
        random(1 if angle_rows == "one" else B, T, C + i, dtype=dtype)[..., :C].contiguous() for i in (0, 1)
    )
    assert can_rotate(q, k, cos, sin)
    for y, x in zip(rotate(q, k, cos, sin), (q, k), strict=True):
        assert y.shape == x.shape
        assert torch.equal(y, _turned(x, cos, sin))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q, k, cos.float(), sin.float()),
        lambda q, k, cos, sin: (q, k, cos[..., :32], sin[..., :32]),
        lambda q, k, cos, sin: (q[..., :24], k[..., :24], cos[..., :24], sin[..., :24]),
        lambda q, k, cos, sin: (q.cpu(), k, cos, sin),
        lambda q, k, cos, sin: (q[..., 1:], k[..., 1:], cos[..., 1:], sin[..., 1:]),
    ],
)
def test_other_rotations_are_left_to_the_model(change: Any) -> None:
    q, k = (random(2, heads, 3, 64, dtype=torch.bfloat16) for heads in (4, 2))
    cos, sin = (random(2, 3, 64, dtype=torch.bfloat16) for _ in range(2))
    assert can_rotate(q, k, cos, sin)
    assert not can_rotate(*change(q, k, cos, sin))


# ---- append ----
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",  # B, N, S, C, V
    [(1, 4, 300, 128, 128), (16, 8, 20, 64, 64), (3, 1, 9, 192, 128), (64, 16, 12, 256, 256)],
    ids=str,
)
def test_steps_follow_one_another_into_the_cache(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, N, S, C, V = shape
    keys, values = random(B, N, S, C, dtype=dtype), random(B, N, S, V, dtype=dtype)
    want_keys, want_values = keys.clone(), values.clone()
    length = torch.tensor(S - 5, device="cuda")
    ticket = torch.zeros(1, dtype=torch.int32, device="cuda")
    for i in range(S - 5, S):
        key, value = (
            random(B, 1, N, dim + i, dtype=dtype)[..., :dim].contiguous().transpose(1, 2) for dim in (C, V)
        )
        assert can_append(key, value, keys, values)
        append(key, value, keys, values, length, ticket)
        want_keys[:, :, i : i + 1], want_values[:, :, i : i + 1] = key, value
        assert length.item() == i + 1
    assert torch.equal(keys, want_keys)
    assert torch.equal(values, want_values)
    assert ticket.item() == 0


@torch.inference_mode()
def test_a_step_layer_is_a_static_layer() -> None:
    """Prompts, steps, resets and beams, beside transformers' own."""
    config = tiny.build("qwen3_moe").config
    mine, theirs = static_cache(config, 40), StaticCache(config=config, max_cache_len=40)
    assert all(type(layer) is StepLayer for layer in mine.layers)
    N, C = config.num_key_value_heads, config.head_dim
    for _ in range(2):
        for num_tokens in (7, 1, 1, 3, 1):
            states = [random(2, N, num_tokens, C + i)[..., :C].contiguous() for i in range(2)]
            for layer_idx in range(len(mine.layers)):
                found, want = (cache.update(*states, layer_idx) for cache in (mine, theirs))
                assert all(torch.equal(y, w) for y, w in zip(found, want, strict=True))
            assert mine.get_seq_length() == theirs.get_seq_length()
        for cache in (mine, theirs):
            cache.reorder_cache(torch.tensor([1, 1], device="cuda"))
            cache.reset()


# ---- choose ----
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 128, 8), (7, 8, 2), (64, 60, 4), (3, 1000, 32), (2, 33, 33), (5, 1, 1)], ids=str
)
def test_the_largest_of_a_softmax(
    shape: tuple[int, int, int], normalises: bool, score_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    T, E, K = shape
    logits = 3 * random(T, E, dtype=dtype)
    if K > 32:
        assert not can_choose(logits, K, score_dtype)
        return
    assert can_choose(logits, K, score_dtype)
    scores, ids = choose(logits, K, normalises, score_dtype)
    p = torch.softmax(logits.double(), -1)
    want = p.topk(K).values
    assert torch.equal(ids.sort(-1).values, ids.unique(dim=-1).sort(-1).values) or T > 1
    assert all(len(row.unique()) == K for row in ids)
    chosen = p.gather(1, ids)
    assert torch.allclose(chosen, want, rtol=1e-6, atol=0), "the largest, up to what scores the same in fp32"
    chosen = chosen / chosen.sum(-1, keepdim=True) if normalises else chosen
    half, tiny_step = torch.finfo(score_dtype).eps / 2, torch.finfo(score_dtype).smallest_normal
    assert torch.allclose(scores.double(), chosen, rtol=half + (E + 8) * 2**-24, atol=tiny_step)


def test_of_equal_scores_the_lower_ids() -> None:
    logits = torch.zeros(3, 40, device="cuda")
    logits[1, 35] = 1
    logits[2, ::2] = -1
    _, ids = choose(logits, 4, True, torch.float32)
    assert ids.tolist() == [[0, 1, 2, 3], [35, 0, 1, 2], [1, 3, 5, 7]]


def test_scores_without_sense_still_name_experts() -> None:
    logits = random(3, 40)
    logits[0, 7], logits[1] = torch.nan, -torch.inf
    scores, ids = choose(logits, 4, False, torch.float32)
    assert scores[:2].isnan().all()
    assert scores[2].isfinite().all()
    assert ((ids >= 0) & (ids < 40)).all()
    assert all(len(row.unique()) == 4 for row in ids)


# ---- normalise ----
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 2048), (2, 1, 32, 128), (3, 520), (1, 8), (70, 64), (5, 5120)], ids=str
)
def test_normalise_is_the_norm_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    assert can_normalise(x, weight)
    y = normalise(x, weight, 1e-5)
    want = F.rms_norm(x.double(), weight.shape, weight.double(), 1e-5)
    info = torch.finfo(dtype)
    slack = info.eps / 2 + (shape[-1] + 8) * 2**-24
    assert y.dtype == dtype
    assert ((y.double() - want).abs() <= slack * want.abs() + info.smallest_normal * info.eps).all()


# ---- project ----
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "shape",  # leading dims, D, F
    [
        ((1, 1), 2048, 4096),
        ((1,), 2048, 128),
        ((1, 1), 4096, 130),
        ((1,), 8, 1),
        ((1, 1), 520, 33),
        ((1, 1), 12288, 64),
    ],
    ids=str,
)
def test_products_of_one_token(shape: Any, with_bias: bool, dtype: torch.dtype) -> None:
    tokens, D, num_out = shape
    x, weight = random(*tokens, D, dtype=dtype), random(num_out, D, dtype=dtype)
    bias = random(num_out, dtype=dtype) if with_bias else None
    assert can_project(x, weight, bias)
    y = project(x, weight, bias)
    want, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        want, terms = want + bias.double(), terms + bias.double().abs()
    half = torch.finfo(dtype).eps / 2
    assert y.shape == want.shape
    assert ((y.double() - want).abs() <= half * want.abs() + (D + 8) * 2**-24 * terms).all()


def test_other_products_are_left_to_the_library() -> None:
    x, weight = random(1, 64, dtype=torch.bfloat16), random(16, 64, dtype=torch.bfloat16)
    assert can_project(x, weight, None)
    for other in (
        (x.float(), weight.float(), None),
        (x.float(), weight, None),
        (x[:, :60], weight[:, :60], None),
        (x, weight, random(16)),
        (random(2, 64, dtype=torch.bfloat16), weight, None),
        (x[:0], weight, None),
        (x, weight.T.contiguous().T, None),
    ):
        assert not can_project(*other)


# ---- a model ----
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_a_model_uses_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    for module, name, kernel in (
        ("rotary", "rotate", rotate),
        ("routers", "choose", choose),
        ("decode_cache", "append", append),
        ("norms", "normalise", normalise),
        ("gpu_dense", "project", project),
    ):

        def told(*args: Any, name: str = name, kernel: Any = kernel) -> Any:
            called.add(name)
            return kernel(*args)

        monkeypatch.setattr(f"monde.models.{module}.{name}", told)
    original = tiny.build("qwen3_moe", dtype).cuda()
    ids = tiny.prompt(1).cuda()
    settings = {
        "max_new_tokens": 30,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(ids),
    }
    want = original.generate(ids, **settings)
    model = monde.offload(original, gpu_memory="1GiB", max_context=80)
    got = model.generate(ids, **settings)
    in_vectors = model.config.head_dim % (32 // dtype.itemsize) == 0
    expected = {"choose", "append", "normalise"} | ({"rotate"} if in_vectors else set())
    assert called == expected | (set() if dtype is torch.float32 else {"project"})
    if dtype is torch.float32:
        assert torch.equal(got, want)
    assert model._decode_runner.num_replays > 0
    model.monde.close()
