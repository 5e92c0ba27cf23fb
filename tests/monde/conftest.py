"""Checkpoints of the tiny models, written once per session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import monde
from tests.monde import tiny


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """checkpoints(name, sharded=..., dtype=...) -> folder."""
    made: dict[Any, Path] = {}

    def make(name: str, sharded: bool = False, dtype: torch.dtype = torch.float32) -> Path:
        key = (name, sharded, dtype)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            tiny.build(name, dtype).save_pretrained(made[key], max_shard_size="40KB" if sharded else "5GB")
        return made[key]

    return make


def _from_pretrained(folder: Path, **settings: Any) -> Any:
    return monde.from_pretrained(str(folder), device="cpu", **settings)


def _quantization_config(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config = monde.MondeConfig(device="cpu", **settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def _offload(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return monde.offload(AutoModelForCausalLM.from_pretrained(folder), device="cpu", **settings)


@pytest.fixture(params=[_from_pretrained, _quantization_config, _offload], ids=lambda f: f.__name__[1:])
def way(request: pytest.FixtureRequest) -> Any:
    """Each of the three ways to a running model: way(folder, **settings) -> model."""
    return request.param
