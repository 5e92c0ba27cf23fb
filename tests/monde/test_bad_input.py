"""Everything a user can get wrong: one clear error that names the remedy."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import monde
from monde.models.outline import outline_of
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
DENSE = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("size_bytes", [3, 100, -10], ids=["no-header", "half-header", "lost-tail"])
def test_truncated_shard(folder: Path, size_bytes: int) -> None:
    shard = shards(folder)[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[:size_bytes])
    with pytest.raises(ValueError, match=r"truncated or damaged; download or copy it again"):
        load(folder, dtype=torch.float32)


def test_missing_shard(folder: Path) -> None:
    missing = shards(folder)[1]
    missing.unlink()
    with pytest.raises(
        monde.CheckpointError, match=rf"{missing.name}: cannot be read \(No such file.*download all files"
    ):
        load(folder)


@pytest.mark.parametrize("text", ["{garbage", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        monde.CheckpointError, match=r"index.json: the file is damaged; download or copy it again"
    ):
        load(folder)


@pytest.mark.parametrize(
    "header",
    [
        [1],
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}},
    ],
    ids=["list", "no-offsets", "before-the-data", "backwards", "another-size", "no-size"],
)
def test_damaged_header(folder: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    shards(folder)[1].write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(monde.CheckpointError, match=r"truncated or damaged; download or copy it again"):
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


def test_mismatched_shape_of_a_dense_weight(folder: Path) -> None:
    edit(folder, DENSE, lambda t: t[:-1].contiguous())
    with pytest.raises(
        monde.CheckpointError, match=rf"{DENSE}: expected shape \[32, 32\].* has \[31, 32\]; use"
    ):
        load(folder)


def test_missing_dense_weight(folder: Path) -> None:
    edit(folder, DENSE, lambda t: None)
    with pytest.raises(
        monde.CheckpointError, match=rf"no tensor for {DENSE}; it is incomplete or of another model"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.float64, "F64")]
)
def test_unsupported_element_type(folder: Path, dtype: torch.dtype, name: str) -> None:
    edit(folder, EXPERT, lambda t: t.to(dtype))
    with pytest.raises(
        monde.CheckpointError, match=rf"stored as {name}; .* F32, F16 and BF16; load .* not quantised"
    ):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_unsupported_type_to_load_in(folder: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"{dtype}.* (load the model in float32|not a floating-point)"):
        load(folder, dtype=dtype)


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
    refused = r"quantised \(fp8\); monde runs bf16, fp16 and fp32"
    with pytest.raises(ValueError, match=refused):
        load(folder)
    with pytest.raises(ValueError, match=refused):  # nor is it planned
        outline_of(str(folder), max_context=16, max_batch=1)


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


@pytest.mark.parametrize("gpu_memory", [0, "40KB"])
def test_ids_of_no_expert_contribute_zero(gpu_memory: Any) -> None:
    layer = monde.offload(tiny.build("qwen3_moe"), device="cpu", gpu_memory=gpu_memory).monde.layers[0]
    x_TD, ones_TK = torch.randn(4, 32), torch.ones(4, 2)
    ids_TK = torch.tensor([[0, -1], [7, 8], [-(2**40), 3], [2**40, -5]])
    alone = layer.forward(x_TD[:3], torch.tensor([[0], [7], [3]]), ones_TK[:3, :1])
    y_TD = layer.forward(x_TD, ids_TK, ones_TK)
    assert torch.equal(y_TD[:3], alone)
    assert not y_TD[3].any()


@pytest.mark.parametrize("settings", [{}, {"gpu_memory": "40KB"}, {"deferred_experts": 1}], ids=str)
def test_use_after_close(settings: dict[str, Any], tmp_path: Path) -> None:
    model = monde.offload(tiny.build("mixtral"), device="cpu", **settings)
    model.monde.close()
    model.monde.close()
    for use in (
        lambda: model(tiny.prompt()),
        lambda: tiny.greedy(model, tiny.prompt()),
        lambda: model.state_dict(),
        lambda: model.save_pretrained(tmp_path),
        lambda: model.monde.begin_step(),
    ):
        with pytest.raises(RuntimeError, match=r"model.monde.close\(\) gave .* load the model again"):
            use()


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
    with pytest.raises(
        TypeError, match="quantization_config is for transformers' from_pretrained; give monde's"
    ):
        monde.from_pretrained(str(tmp_path), quantization_config=monde.MondeConfig())
    with pytest.raises(FileNotFoundError, match="the model's name is empty; give a folder"):
        monde.from_pretrained("")


def test_settings_of_offload_are_refused_by_name() -> None:
    model = tiny.build("mixtral")
    with pytest.raises(TypeError, match="expected a MondeConfig, got dict; give its settings by name"):
        monde.offload(model, {"device": "cpu"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="either config= or single settings"):
        monde.offload(model, monde.MondeConfig(), device="cpu")
    assert not hasattr(model, "monde")


def test_a_budget_above_the_machine_is_refused() -> None:
    for settings in ({"host_memory": "900PiB"}, {"gpu_memory": "900PiB", "device": "cpu"}):
        with pytest.raises(ValueError, match=r"_memory: 900 PiB is more than .*; ask for less"):
            monde.offload(tiny.build("mixtral"), **settings)


_FORK = """
import os, torch
torch.set_num_threads(1)  # torch's own threads do not survive a fork
import monde
from tests.monde import tiny
model = monde.offload(tiny.build("qwen3_moe"), device="cpu")
before = model(tiny.prompt()).logits
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(model(tiny.prompt()).logits, before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(model(tiny.prompt()).logits, before)
"""


def test_a_forked_process_runs_the_model() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_state_dict_can_be_stored(tmp_path: Path) -> None:
    original = tiny.build("qwen3_moe")
    torch.save(monde.offload(tiny.build("qwen3_moe"), device="cpu").state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(weights[key], value) for key, value in original.state_dict().items())


def test_a_bf16_model_cannot_be_pickled_either() -> None:
    model = monde.offload(tiny.build("qwen3_moe", torch.bfloat16), device="cpu")
    with pytest.raises(TypeError, match="use save_pretrained"):
        pickle.dumps(model)


def test_more_experts_a_token_than_there_are(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 99}))
    with pytest.raises(ValueError, match=r"num_experts_per_tok=99 and has layers of \d+ experts; correct"):
        monde.from_pretrained(folder, device="cpu")
