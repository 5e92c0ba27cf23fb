"""A model's outline from its configuration against the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import SwitchTransformersConfig

from monde.config import MondeConfig
from monde.models.experts import find_experts
from monde.models.outline import outline_of
from monde.models.sizing import model_size
from tests.monde.tiny import NAMES, build


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    tiny = build(name)
    model = type(tiny)._from_config(tiny.config, dtype=torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    outlined = outline_of(str(tmp_path), max_context=100, max_batch=3)
    modules = find_experts(model)
    assert outlined.size == model_size(model, modules, MondeConfig(max_context=100, max_batch=3), on_gpu=True)
    assert len(outlined.outline.layers) == len(modules)
    for layer, module in zip(outlined.outline.layers, modules, strict=True):
        assert layer.shape.expert_bytes == module.spec.expert_bytes
        assert layer.num_topk == model.config.num_experts_per_tok
        assert layer.popularity_E.shape == (module.spec.num_experts,)
        assert layer.popularity_E.sum() == pytest.approx(1)
    embedding_bytes = model.get_input_embeddings().weight.nbytes
    tied = model.config.tie_word_embeddings
    assert outlined.size.dense_bytes - outlined.outline.dense_read_bytes == (0 if tied else embedding_bytes)


def test_what_cannot_be_forecast_is_refused(tmp_path: Path) -> None:
    SwitchTransformersConfig(vocab_size=64, d_model=32, d_ff=48, num_experts=4).save_pretrained(
        tmp_path / "switch"
    )
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        outline_of(str(tmp_path / "switch"), 16, 1)
