"""Families with unusual caches: recorded steps give the same text, or the reason why there are none is said."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.models.animals import ANIMALS
from tests.models.zoo import build, example_inputs
from tests.monde.eager_capture import with_graphs

ANIMAL_OF = {animal.family: animal for animal in ANIMALS}
RECORDED = ("gemma4", "phimoe", "cohere2_moe", "deepseek_v2", "dbrx", "step3p7", "glm4v_moe")
EAGER = {
    "qwen3_next": "LinearAttention",
    "jamba": "LinearAttention",
    "deepseek_v32": "StaticIndexedLayer",
    "deepseek_v4": "no static cache",
    "minimax": "own kind of cache",
    "nllb_moe": "encoder-decoder",
}


def reasons(family: str) -> list[str]:
    """What is said while the text is compared."""
    if not ANIMAL_OF[family].is_available:
        pytest.skip(f"came with transformers {ANIMAL_OF[family].since}")
    model = build(ANIMAL_OF[family])
    ids = example_inputs(ANIMAL_OF[family])["input_ids"][:, :6]
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 16}
    settings |= {"eos_token_id": None, "pad_token_id": 0}
    want = model.generate(ids, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(with_graphs(model).generate(ids, **settings), want)
    said = [str(w.message) for w in caught if "run eagerly" in str(w.message)]
    assert bool(said) == (model._decode_runner.num_replays == 0)
    return said


@pytest.mark.parametrize("family", RECORDED)
def test_recorded(family: str) -> None:
    assert not reasons(family)


@pytest.mark.parametrize("family", EAGER)
def test_eager(family: str) -> None:
    (reason,) = reasons(family)
    assert EAGER[family] in reason


def test_chunked_attention_where_transformers_can_mask_it() -> None:
    said = reasons("llama4")
    assert not said or "chunked attention" in said[0]
