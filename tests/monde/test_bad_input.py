"""Everything a user can get wrong: one clear error that names the remedy."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import monde
from tests.monde import tiny


@pytest.fixture
def folder(checkpoints: Any, tmp_path: Path) -> Path:
    """A copy of the sharded Qwen3-MoE checkpoint, to be damaged."""
    shutil.copytree(checkpoints("qwen3_moe", sharded=True), tmp_path / "copy")
    return tmp_path / "copy"


def load(folder: Path, **settings: Any) -> Any:
    return monde.from_pretrained(str(folder), device="cpu", **settings)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit(folder: Path, key: str, change: Any) -> None:
    """Replace one tensor; `change` returns the new one, or None to drop it."""
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = folder / index["weight_map"][key]
    tensors = load_file(shard)
    tensor = change(tensors.pop(key))
    if tensor is None:
        del index["weight_map"][key]
    else:
        tensors[key] = tensor
    save_file(tensors, shard, metadata={"format": "pt"})
    index_file.write_text(json.dumps(index))


EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"


@pytest.mark.parametrize("size_bytes", [3, 100, -10], ids=["no-header", "half-header", "lost-tail"])
def test_truncated_shard(folder: Path, size_bytes: int) -> None:
    shard = shards(folder)[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[:size_bytes])
    with pytest.raises(ValueError, match=r"truncated or damaged; download or copy it again"):
        load(folder, dtype=torch.float32)


def test_missing_shard(folder: Path) -> None:
    shards(folder)[1].unlink()
    with pytest.raises(OSError, match=shards(folder)[1].stem[:10]):
        load(folder)


def test_missing_expert(folder: Path) -> None:
    edit(folder, EXPERT, lambda t: None)
    with pytest.raises(monde.CheckpointError, match=r"lacks experts \[5\].*config.json says 8 experts"):
        load(folder)


def test_more_experts_than_the_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_local_experts" if "num_local_experts" in config else "num_experts"] = 6
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(monde.CheckpointError, match=r"unexpected experts \[6, 7\]"):
        load(folder)


def test_missing_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"], config["layer_types"] = 3, None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(monde.CheckpointError, match=r"no tensor for model.layers.2.mlp.experts"):
        load(folder)


def test_mismatched_shape(folder: Path) -> None:
    edit(folder, EXPERT, lambda t: t[:, :-1].contiguous())
    with pytest.raises(monde.CheckpointError, match=rf"{EXPERT}: expected shape \[32, 24\].*has \[32, 23\]"):
        load(folder)


def test_unsupported_element_type(folder: Path) -> None:
    edit(folder, EXPERT, lambda t: t.to(torch.float8_e4m3fn))
    with pytest.raises(monde.CheckpointError, match=r"stored as F8_E4M3.*not quantised"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_weights(folder: Path, value: float) -> None:
    edit(folder, EXPERT, lambda t: t.index_fill(0, torch.tensor([3]), value))
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts, expert 5: .*down"):
        load(folder)


def test_nan_in_a_live_model_leaves_it_unchanged() -> None:
    model = tiny.build("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5, 3, 2] = float("nan")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts, expert 5"):
        monde.offload(model, device="cpu")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) or "layers.1.mlp.experts.down" in k for k in before)
    assert not hasattr(model, "monde")


def test_bin_checkpoint(tmp_path: Path) -> None:
    model = tiny.build("mixtral")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(monde.CheckpointError, match=r"safetensors files only; convert"):
        load(tmp_path)


def test_prequantised_checkpoint(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantised \(fp8\); monde runs bf16, fp16 and fp32"):
        load(folder)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_model_without_experts(tmp_path: Path) -> None:
    model = tiny.dense()
    with pytest.raises(monde.UnsupportedModelError, match="has no experts"):
        monde.offload(model, device="cpu")
    model.save_pretrained(tmp_path)
    with pytest.raises(monde.UnsupportedModelError, match="has no experts"):
        load(tmp_path)


def test_unknown_family_names_the_known_ones() -> None:
    model = tiny.dense()
    model.config.num_experts = 4
    with pytest.raises(monde.UnsupportedModelError, match=r"Supported: .*mixtral.*qwen3_moe"):
        monde.offload(model, device="cpu")


def test_unknown_activation() -> None:
    model = tiny.build("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = torch.nn.Tanh()
    with pytest.raises(ValueError, match=r"MixtralExperts: its activation is none of those supported"):
        monde.offload(model, device="cpu")


def test_offload_twice() -> None:
    model = monde.offload(tiny.build("mixtral"), device="cpu")
    with pytest.raises(ValueError, match="monde runs this model already"):
        monde.offload(model, device="cpu")


def test_not_a_model() -> None:
    with pytest.raises(ValueError, match="expected a transformers model, got Linear"):
        monde.offload(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_model_on_meta() -> None:
    model = tiny.build("mixtral").to("meta")
    with pytest.raises(ValueError, match=r"use monde.from_pretrained"):
        monde.offload(model, device="cpu")


def test_device_map_elsewhere(folder: Path) -> None:
    with pytest.raises(ValueError, match="leave device_map out"):
        load(folder, device_map={"": "meta"})


def test_a_name_alone_runs_nothing() -> None:
    model = tiny.build("mixtral")
    import monde.models  # noqa: F401  registers the name

    model.set_experts_implementation("monde")
    with pytest.raises(RuntimeError, match=r"call monde.offload\(model\)"):
        model(tiny.prompt())


def test_use_after_close() -> None:
    model = monde.offload(tiny.build("mixtral"), device="cpu")
    model.monde.close()
    model.monde.close()
    with pytest.raises(RuntimeError, match="closed"):
        model(tiny.prompt())


def test_budget_is_checked_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monde.weights.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "tensor", lambda *args: pytest.fail("read a weight"))
    with pytest.raises(
        monde.BudgetError, match=r"host_memory of 1 MiB is short by .* Give at least host_memory=\d+"
    ):
        load(folder, host_memory="1MiB")


def test_failed_load_can_be_repeated(folder: Path) -> None:
    with pytest.raises(monde.BudgetError) as error:
        load(folder, host_memory="1MiB")
    model = load(folder, host_memory=error.value.smallest_bytes)
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(tiny.greedy(model, tiny.prompt()), tiny.greedy(original, tiny.prompt()))


# ---- what a stranger tried ----
def test_arguments_of_from_pretrained_are_refused_by_name(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope: no such folder; give a folder with config.json"):
        monde.from_pretrained(str(tmp_path / "nope"))
    with pytest.raises(TypeError, match="expected a folder or a hub id, got None"):
        monde.from_pretrained(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unknown option gpu_mem; did you mean gpu_memory\?"):
        monde.from_pretrained(str(tmp_path), gpu_mem="1GiB")


def test_weights_cannot_be_loaded_into_experts_that_monde_holds() -> None:
    model = monde.offload(tiny.build("qwen3_moe"), device="cpu")
    with pytest.raises(
        RuntimeError, match=r"model.layers.\d.mlp.experts: .* load the weights before monde.offload"
    ):
        model.load_state_dict(model.state_dict())
    model(tiny.prompt())


def test_a_bf16_model_cannot_be_pickled_either() -> None:
    model = monde.offload(tiny.build("qwen3_moe", torch.bfloat16), device="cpu")
    with pytest.raises(TypeError, match="use save_pretrained"):
        pickle.dumps(model)
