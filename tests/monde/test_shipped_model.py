"""The trained model that the repository ships: real routing, real text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import monde
from tests.monde import tiny

FOLDER = Path(__file__).parents[2] / "assets" / "moe-3m"


@pytest.mark.parametrize("gpu_memory", [0, "2MiB"])
def test_same_text_in_float32(gpu_memory: int | str) -> None:
    original = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    model = monde.from_pretrained(str(FOLDER), device="cpu", dtype=torch.float32, gpu_memory=gpu_memory)
    ids = AutoTokenizer.from_pretrained(FOLDER)("The first step is", return_tensors="pt").input_ids
    with torch.no_grad():
        tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
    assert torch.equal(tiny.greedy(model, ids), tiny.greedy(original, ids))
