"""How long a sequence may be: configurations as they are published, and what stretches rotary embeddings."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import DbrxConfig, DeepseekV3Config, Qwen3MoeConfig, SwitchTransformersConfig

from monde.models.positions import positions_of

SIZE = {"max_position_embeddings": 4096}


def stretched(rope_type: str, **more: Any) -> Any:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **more}
    return Qwen3MoeConfig(**SIZE, rope_parameters=rope)


@pytest.mark.parametrize(
    ("config", "num_positions"),
    [
        (Qwen3MoeConfig(**SIZE), 4096),
        (DbrxConfig(max_seq_len=2048), 2048),
        (SwitchTransformersConfig(), None),  # relative distances have no end
        (stretched("linear", factor=2.0), 8192),
        (stretched("dynamic", factor=2.5), 10240),
        (stretched("yarn", factor=4.0), 16384),
        (stretched("yarn", factor=4.0, original_max_position_embeddings=2048), 8192),  # as Qwen3's card says to
        (stretched("yarn", factor=2.0, original_max_position_embeddings=2048), 4096),  # as DeepSeek-V3's is
        (stretched("llama3", factor=2.0, original_max_position_embeddings=1024, low_freq_factor=1, high_freq_factor=4), 4096),
        (DeepseekV3Config(**SIZE, rope_scaling={"type": "yarn", "factor": 40}), 163840),  # as it was before 5.0
    ],
)  # fmt: skip
def test_positions(config: Any, num_positions: int | None) -> None:
    assert positions_of(config) == num_positions


def test_kinds_of_layers_have_their_own_embeddings() -> None:
    config = stretched("default")
    config.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    assert positions_of(config) == 8 * 4096
