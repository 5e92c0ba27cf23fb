"""What transformers and torch ask of a model's parameters, after its experts are none any more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import monde
from tests.monde import tiny


@pytest.mark.parametrize("name", tiny.NAMES)
def test_experts_are_counted_as_before(name: str, way: Any, checkpoints: Any) -> None:
    original, model = tiny.build(name), way(checkpoints(name))
    for embeddings in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**embeddings) == original.num_parameters(**embeddings)
    assert model.get_memory_footprint() == original.get_memory_footprint()
    own = [p for n, p in original.named_parameters() if ".experts." not in n or "shared" in n]
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in own)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.to(torch.float64),
        lambda model: model.to("meta"),
        lambda model: model.to_empty(device="meta"),
    ],
    ids=["double", "to-float64", "to-meta", "to-empty"],
)
def test_what_experts_cannot_follow_is_refused_at_once(
    way: Any, checkpoints: Any, change: Callable[[Any], Any]
) -> None:
    model = way(checkpoints("qwen3_moe"))
    before = model(tiny.prompt()).logits
    with pytest.raises(
        ValueError, match=r"monde runs this model on cpu in float32, bfloat16, float16, not on .* load it"
    ):
        change(model)
    assert torch.equal(model(tiny.prompt()).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_weights_may_change_their_type(dtype: torch.dtype) -> None:
    original = tiny.build("qwen3_moe")
    model = monde.offload(copy.deepcopy(original), device="cpu").to(dtype).to("cpu")
    ids = tiny.prompt()
    with torch.no_grad():
        exact = tiny.in_float64(original)(ids).logits
        own_error = (original.to(dtype)(ids).logits.double() - exact).abs().mean()
        error = (model(ids).logits.double() - exact).abs().mean()
    assert model.dtype == dtype
    assert error <= 1.5 * own_error


def test_a_copy_answers_for_itself() -> None:
    model = monde.offload(tiny.build("mixtral"), device="cpu")
    other = copy.deepcopy(model).bfloat16()
    assert (model.dtype, other.dtype) == (torch.float32, torch.bfloat16)
    assert other.num_parameters() == model.num_parameters()
