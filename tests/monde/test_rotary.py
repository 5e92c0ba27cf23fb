"""Whose rotary embeddings are done at once is found by what they compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monde.models import rotary
from monde.models.rotary import fuse_rotary, turns_halves
from tests.monde import tiny


def halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x: Tensor) -> Tensor:
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def in_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    def turned(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    return tuple(x * cos.unsqueeze(1) + turned(x) * sin.unsqueeze(1) for x in (q, k))


def in_fp32(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return tuple(y.to(q.dtype) for y in halves(q.float(), k.float(), cos.float(), sin.float()))


def other_way(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return halves(q, k, cos, -sin)


def keys_alone(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return k


@pytest.mark.parametrize(
    ("function", "does"),
    [(halves, True), (in_pairs, False), (in_fp32, False), (other_way, False), (keys_alone, False)],
)
def test_what_turns_by_halves(function: Any, does: bool) -> None:
    assert turns_halves(function) is does


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    return halves(q, k, cos, sin, unsqueeze_dim)


class Attention(nn.Module):
    """As models write it; by_keyword: with an argument that the kernel does not know."""

    by_keyword = False

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, scale: float = 1.0) -> Any:
        if self.by_keyword:
            return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q * scale, k


def states() -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16), torch.randn(2, 3, 16), torch.randn(2, 3, 16)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been launched."""
    found: list[str] = []

    def rotate(*args: Tensor) -> tuple[Tensor, ...]:
        found.append("rotate")
        return halves(*args)

    monkeypatch.setattr(rotary, "can_rotate", lambda *args: True)
    monkeypatch.setattr(rotary, "rotate", rotate)
    return found


@torch.no_grad()
def test_one_model_alone_is_changed(calls: list[str]) -> None:
    model, other, inputs = Attention(), Attention(), states()
    want = other(*inputs, scale=2.0)
    assert fuse_rotary(model) == 1
    assert fuse_rotary(model) == 0, "it is already"
    for mine in (model, copy.deepcopy(model)):
        calls.clear()
        got = mine(*inputs, scale=2.0)
        assert calls == ["rotate"]
        assert all(torch.equal(y, w) for y, w in zip(got, want, strict=True))
        assert isinstance(mine, Attention)
    calls.clear()
    other(*inputs)
    assert not calls


@pytest.mark.parametrize("why", ["gradients", "another argument"])
def test_other_calls_stay(calls: list[str], why: str) -> None:
    model = Attention()
    fuse_rotary(model)
    model.by_keyword = why == "another argument"
    q, k, cos, sin = states()
    if model.by_keyword:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    with torch.set_grad_enabled(why == "gradients"):
        model(q, k, cos, sin)
    assert not calls


def test_without_a_gpu_a_model_is_as_before() -> None:
    model = tiny.build("qwen3_moe", torch.bfloat16)
    ids = tiny.prompt(2)
    with torch.no_grad():
        want = model(ids).logits
        assert fuse_rotary(model) == model.config.num_hidden_layers
        assert torch.equal(model(ids).logits, want)
