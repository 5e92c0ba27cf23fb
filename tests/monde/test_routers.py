"""Whose routers choose at once is found by what they compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from monde.models import routers
from monde.models.routers import Choice, choice_of, fuse_routers
from tests.monde import tiny

E, D, K = 12, 32, 3


class Router(nn.Module):
    """Softmax and its largest; subclasses differ in one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))

    def scores(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, -1, dtype=torch.float32)

    def forward(self, x: Tensor) -> Any:
        logits = F.linear(x, self.weight)
        scores, ids = self.scores(logits).topk(K)
        return logits, scores, ids


class Sigmoid(Router):
    def scores(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid()


class Smallest(Router):
    def forward(self, x: Tensor) -> Any:
        logits = F.linear(x, self.weight)
        scores, ids = self.scores(logits).topk(K, largest=False)
        return logits, scores, ids


class Scaled(Router):
    def forward(self, x: Tensor) -> Any:
        logits, scores, ids = super().forward(x)
        return logits, 2.5 * scores, ids


class Biased(Router):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(E))


class OtherLogits(Router):
    def forward(self, x: Tensor) -> Any:
        logits, scores, ids = super().forward(x)
        return logits.softmax(-1), scores, ids


class Fails(Router):
    def forward(self, x: Tensor) -> Any:
        raise ValueError("not on its own")


def test_a_softmax_and_its_largest() -> None:
    assert choice_of(Router()) == Choice(K, False, torch.float32)


def test_matrices_that_are_no_routers_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and embeddings are large, and so is what a trial takes."""
    many = Router()
    many.weight = nn.Parameter(torch.empty(5000, D))
    matrices = [many, nn.Linear(D, 8, bias=False), nn.Embedding(8, D)]
    monkeypatch.setattr(torch, "randn", None)
    assert [choice_of(module) for module in matrices] == [None] * 3


@pytest.mark.parametrize("cls", [Sigmoid, Smallest, Scaled, Biased, OtherLogits, Fails, nn.Identity])
def test_others_stay(cls: type[nn.Module]) -> None:
    module = cls()
    before = copy.deepcopy(module.state_dict())
    assert choice_of(module) is None
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalises", [True, False])
def test_models_routers(dtype: torch.dtype, normalises: bool) -> None:
    config = tiny.build("qwen3_moe").config
    config.norm_topk_prob = normalises
    router = Qwen3MoeTopKRouter(config).to(dtype)
    assert choice_of(router) == Choice(config.num_experts_per_tok, normalises, None), (
        "scores follow the model"
    )
    assert router.weight.dtype is dtype
    assert (router.weight == 0).all(), "weights are the model's again"
    mixtral = MixtralTopKRouter(tiny.build("mixtral").config).to(dtype)
    assert choice_of(mixtral) == Choice(mixtral.top_k, True, torch.float32)


@torch.no_grad()
def test_a_fused_router_gives_what_it_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def choose(logits: Tensor, num_topk: int, normalises: bool, dtype: torch.dtype) -> Any:
        calls.append((num_topk, normalises, dtype))
        return torch.softmax(logits, -1).topk(num_topk)

    router, x = Router(), torch.randn(5, D)
    want = router(x)
    assert fuse_routers(router) == 1
    assert isinstance(router, Router)
    assert fuse_routers(router) == 0, "it is already"
    got = router(x)
    assert all(torch.equal(y, w) for y, w in zip(got, want, strict=True)), "without a GPU as before"
    monkeypatch.setattr(routers, "can_choose", lambda *args: True)
    monkeypatch.setattr(routers, "choose", choose)
    got = copy.deepcopy(router)(x)
    assert calls == [(K, False, torch.float32)]
    assert all(torch.equal(y, w) for y, w in zip(got, want, strict=True))
    with torch.enable_grad():
        router(x)
    assert len(calls) == 1, "gradients flow through the model's own"
