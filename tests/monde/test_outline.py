"""A model's outline from its configuration against the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, NllbMoeConfig, SwitchTransformersConfig

from monde.config import MondeConfig
from monde.models.experts import ExpertsModule, find_experts
from monde.models.outline import outline_of
from monde.models.sizing import model_size
from monde.weights.checkpoint import CheckpointError, read_header
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_a_checkpoint_is_split_as_loading_would(name: str, shard: str, tmp_path: Path) -> None:
    tiny = build(name)
    tiny.save_pretrained(tmp_path, max_shard_size=shard)
    outlined = outline_of(str(tmp_path), 16, 1)
    stored, modules = outlined.stored, find_experts(tiny)
    assert stored is not None
    names = {module.full_name(param) for module in modules for param in module.param_names()}
    own = {
        t.data_ptr(): (name, t.nbytes) for name, t in tiny.state_dict().items()
    }  # tied ones are stored once
    held = dict(own.values())
    assert stored.expert_bytes == sum(n for name, n in held.items() if name in names)
    assert stored.dense_bytes == sum(n for name, n in held.items() if name not in names)
    assert (stored.num_files > 1) == (shard == "20KB")
    assert stored.unused_bytes == 0


def test_the_checkpoint_gives_the_type_where_the_configuration_has_none(tmp_path: Path) -> None:
    tiny = build(NAMES[0])
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with_checkpoint = outline_of(str(tmp_path), 16, 1).size
    assert with_checkpoint.expert_bytes == sum(p.nbytes for m in find_experts(tiny) for p in _params(m))
    (tmp_path / "model.safetensors").unlink()
    without = outline_of(str(tmp_path), 16, 1)
    assert without.stored is None
    assert 2 * without.size.expert_bytes == with_checkpoint.expert_bytes


def _params(module: ExpertsModule) -> list[torch.Tensor]:
    return [module.module.get_parameter(name) for name in module.param_names()]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny = build(NAMES[0])
    tiny.save_pretrained(tmp_path)
    tiny.config.num_experts *= 2
    tiny.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="use the config and all shards of one model"):
        outline_of(str(tmp_path), 16, 1)


def test_a_missing_shard_leaves_the_configuration(tmp_path: Path) -> None:
    build(NAMES[0]).save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("*.safetensors")).unlink()
    assert outline_of(str(tmp_path), 16, 1).stored is None


def test_the_index_alone_tells_that_the_model_is_this_one(tmp_path: Path) -> None:
    tiny = build(NAMES[0])
    tiny.save_pretrained(tmp_path, max_shard_size="20KB")
    whole = outline_of(str(tmp_path), 16, 1)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    told = outline_of(str(tmp_path), 16, 1)
    assert whole.index is None
    assert whole.stored is not None
    assert told.index is not None
    assert told.index.num_files == whole.stored.num_files > 1
    assert told.index.total_bytes == whole.stored.dense_bytes + whole.stored.expert_bytes
    assert told.size == whole.size
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {k: f for k, f in index["weight_map"].items() if "down_proj" not in k}
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"its index names no tensor for .*down_proj"):
        outline_of(str(tmp_path), 16, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_index_tells_the_type_where_the_configuration_has_none(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    build(name, dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    whole = outline_of(str(tmp_path), 16, 1)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("dtype") == str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config))
    told = outline_of(str(tmp_path), 16, 1)
    assert told.stored_dtype is dtype
    assert told.size == whole.size
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["metadata"]["total_size"] //= 4
    index_file.write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match="bytes a weight, which is neither fp32 nor bf16; name the dtype in config"
    ):
        outline_of(str(tmp_path), 16, 1)
    del index["metadata"]
    index_file.write_text(json.dumps(index))
    assert outline_of(str(tmp_path), 16, 1).stored_dtype is torch.bfloat16


def test_headers_are_enough_to_plan_and_not_to_load(tmp_path: Path) -> None:
    build(NAMES[0]).save_pretrained(tmp_path, max_shard_size="20KB")
    whole = outline_of(str(tmp_path), 16, 1)
    shards = list(tmp_path.glob("*.safetensors"))
    for shard in shards:
        data = shard.read_bytes()
        shard.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    assert outline_of(str(tmp_path), 16, 1).stored == whole.stored
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_header(shards[0])
    shards[0].write_bytes(shards[0].read_bytes() + b"\0" * 16)  # neither all of it nor none
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        outline_of(str(tmp_path), 16, 1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    build(NAMES[0]).save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: the file is damaged"):
        outline_of(str(tmp_path), 16, 1)


def test_without_a_gpu_nothing_is_kept_for_its_libraries(tmp_path: Path) -> None:
    build(NAMES[0]).config.save_pretrained(tmp_path)
    assert outline_of(str(tmp_path), 16, 1, on_gpu=False).size.library_bytes == 0
    assert outline_of(str(tmp_path), 16, 1).size.library_bytes > 0


SEQ2SEQ = {
    "switch": SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_ff=48,
        d_kv=16,
        num_heads=4,
        num_experts=4,
        num_layers=4,
        num_decoder_layers=2,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=1,
    ),
    "nllb": NllbMoeConfig(
        vocab_size=64,
        d_model=32,
        num_experts=4,
        encoder_layers=4,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=24,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    ),
}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_an_encoder_and_a_decoder_are_forecast_apart(name: str, tmp_path: Path) -> None:
    config = SEQ2SEQ[name]
    config.save_pretrained(tmp_path)
    outlined = outline_of(str(tmp_path), 16, 1, dtype=torch.float32)
    halves = outlined.halves
    assert halves is not None
    # Every other block has experts: two of the encoder's four, one of the decoder's two.
    assert (halves.encoder_ids, halves.decoder_ids) == ((0, 1), (2,))
    assert [layer.num_topk for layer in outlined.outline.layers] == [1 if name == "switch" else 2] * 3
    assert not halves.decoder.is_captured
    model = AutoModelForSeq2SeqLM.from_config(config)
    encoder, decoder = model.get_encoder(), model.get_decoder()
    keys_and_values = [
        m.get_parameter(p)
        for m in decoder.modules()
        if type(m).__name__ in ("SwitchTransformersLayerCrossAttention", "NllbMoeAttention")
        and (name == "switch" or m in [layer.cross_attention for layer in decoder.layers])
        for p, _ in m.named_parameters()
        if ".k." in f".{p}" or ".v." in f".{p}" or "k_proj" in p or "v_proj" in p
    ]
    cross = sum(p.nbytes for p in keys_and_values)
    assert cross == 2 * 2 * (32 * (64 if name == "switch" else 32) + (0 if name == "switch" else 32)) * 4
    experts = {id(p) for m in find_experts(model) for p in _params(m)}
    embedding = model.get_input_embeddings().weight

    def dense(half: torch.nn.Module) -> int:
        return sum(
            p.nbytes
            for path, p in half.named_parameters()
            if id(p) not in experts and p is not embedding and "relative_attention_bias" not in path
        )

    assert halves.encoder.dense_read_bytes == dense(encoder) + cross
    assert halves.decoder.dense_read_bytes == dense(decoder) - cross + embedding.nbytes
    # Own tokens and the prompt's, in both blocks of the decoder: what the cache of one step holds.
    ids = torch.zeros(1, 1, dtype=torch.long)
    seen = encoder.eval()(input_ids=ids)
    cache = model.eval()(encoder_outputs=seen, decoder_input_ids=ids, use_cache=True).past_key_values
    held = sum(
        t.nbytes
        for half in (cache.self_attention_cache, cache.cross_attention_cache)
        for layer in half.layers
        for t in (layer.keys, layer.values)
    )
    assert outlined.size.kv_bytes_per_token == 2 * halves.decoder.kv_bytes_per_token == held
