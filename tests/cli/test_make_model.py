"""The benchmark's large model: written as a checkpoint that transformers and monde both load."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.cli.conftest import MODEL

sys.path.insert(0, str(MODEL.parents[1]))

from bench.make_model import demo_config, write_model


def test_checkpoint_loads_and_answers_alike(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import monde

    config = demo_config(num_layers=1, num_experts=9)
    config.hidden_size, config.moe_intermediate_size, config.num_attention_heads, config.head_dim = (
        64,
        32,
        4,
        16,
    )
    num_params = write_model(tmp_path, config)
    original = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert sum(p.numel() for p in original.parameters()) == num_params
    wrapped = monde.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(wrapped(tokens).logits, original(tokens).logits, rtol=1e-4, atol=1e-5)
