"""A model over ranks when one rank goes wrong: one clear line on all of them, in time, and never other weights."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

import monde
from tests.distributed.ranks import run_ranks
from tests.monde import tiny

TIMEOUT_S = 4.0


def message_of(folders: list[str], settings_W: list[dict[str, Any]], way: str) -> tuple[str, str, float]:
    """Kind and text of the error with which loading ends on this rank, and after how many seconds."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    settings = {"device": "cpu", "mesh": mesh, "mesh_timeout_s": TIMEOUT_S} | settings_W[rank]
    start_s = time.perf_counter()
    try:
        if way == "from_pretrained":
            monde.from_pretrained(folders[rank], **settings)
        elif way == "quantization_config":
            config = monde.MondeConfig(**settings)
            AutoModelForCausalLM.from_pretrained(folders[rank], quantization_config=config)
        else:
            model = AutoModelForCausalLM.from_pretrained(folders[rank])
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            try:
                monde.offload(model, **settings)
            finally:  # unchanged after an error
                after = model.state_dict()
                assert all(torch.equal(before[name], after[name]) for name in before) or way == "nan"
    except Exception as error:
        return type(error).__name__, str(error), time.perf_counter() - start_s
    return "", "", 0.0


def fails(
    tmp_path: Path, folders: list[Path], settings_W: list[dict[str, Any]], way: str
) -> list[tuple[str, str]]:
    told = run_ranks(
        message_of, len(folders), tmp_path, list(map(str, folders)), settings_W, way, deadline_s=60
    )
    for _, text, seconds_s in told:
        assert text, "loading went through"
        assert "\n" not in text
        assert seconds_s < TIMEOUT_S + 10
    return [(kind, text) for kind, text, _ in told]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """One checkpoint of several files for each of two ranks."""
    tiny.build("qwen3_moe").save_pretrained(tmp_path / "0", max_shard_size="40KB")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    return [tmp_path / "0", tmp_path / "1"]


@pytest.mark.parametrize("way", ["from_pretrained", "quantization_config", "offload"])
@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ({"parallel": "peers"}, {}, r"differ in parallel: rank 0 peers, rank 1 sharded"),
        (
            {"mesh_shares": (1, 2)},
            {"mesh_shares": (2, 1)},
            r"differ in mesh_shares: rank 0 \(1.0, 2.0\), rank 1",
        ),
    ],
)
def test_other_settings(
    tmp_path: Path, folders: list[Path], way: str, one: dict[str, Any], other: dict[str, Any], what: str
) -> None:
    for kind, text in fails(tmp_path, folders, [one, other], way):
        assert kind == "ValueError"
        assert re.search(f"mesh: ranks {what}.*; give all of them the same", text), text


def test_another_model(tmp_path: Path, folders: list[Path]) -> None:
    tiny.build("olmoe").save_pretrained(tmp_path / "other")
    for kind, text in fails(tmp_path, [folders[0], tmp_path / "other"], [{}, {}], "from_pretrained"):
        assert kind == "ValueError"
        assert "mesh: ranks differ in " in text


@pytest.mark.parametrize("way", ["from_pretrained", "offload"])
@pytest.mark.parametrize("tuned", ["self_attn.q_proj.weight", "mlp.experts.down_proj"])
def test_other_weights_of_one_architecture(tmp_path: Path, folders: list[Path], way: str, tuned: str) -> None:
    """Silently mixed, they would give an answer that is neither model's."""
    model = tiny.build("qwen3_moe")
    with torch.no_grad():
        model.model.layers[0].get_parameter(tuned).mul_(1.01)
    model.save_pretrained(tmp_path / "tuned")
    for kind, text in fails(tmp_path, [folders[0], tmp_path / "tuned"], [{}, {}], way):
        assert kind == "ValueError"
        assert re.search(r"mesh: ranks differ in (dense weights|experts) \(digest\)", text), text


def test_a_missing_shard(tmp_path: Path, folders: list[Path]) -> None:
    sorted(folders[1].glob("*.safetensors"))[-1].unlink()
    (kind, heard), (_, own) = fails(tmp_path, folders, [{}, {}], "from_pretrained")
    assert kind == "RankError"
    assert heard == "mesh: rank 1: " + " ".join(own.split())


def test_a_damaged_shard(tmp_path: Path, folders: list[Path]) -> None:
    shard = sorted(folders[1].glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-10])
    (kind, heard), (_, own) = fails(tmp_path, folders, [{}, {}], "from_pretrained")
    assert kind == "RankError"
    assert heard == f"mesh: rank 1: {own}"
    assert "truncated or damaged; download or copy it again" in own or "incomplete" in own


def test_a_folder_that_is_not_there(tmp_path: Path, folders: list[Path]) -> None:
    (kind, heard), (_, own) = fails(tmp_path, [folders[0], tmp_path / "nowhere"], [{}, {}], "from_pretrained")
    assert kind == "RankError"
    assert heard == f"mesh: rank 1: {own}"


@pytest.mark.parametrize("way", ["from_pretrained", "offload"])
def test_too_little_memory_on_one_rank(tmp_path: Path, folders: list[Path], way: str) -> None:
    (kind, heard), (own_kind, own) = fails(tmp_path, folders, [{}, {"host_memory": "1KB"}], way)
    assert (kind, own_kind) == ("RankError", "BudgetError")
    assert heard == "mesh: rank 1: " + " ".join(own.split())


def test_more_ranks_than_rows(tmp_path: Path, folders: list[Path]) -> None:
    settings = {"mesh_shares": (1, 1e-9)}  # a row for everybody all the same
    told = run_ranks(message_of, 2, tmp_path, list(map(str, folders)), [settings, settings], "offload")
    assert [text for _, text, _ in told] == ["", ""]


def struck(how: str) -> tuple[str, float]:
    """Two generations; in the second rank 1 dies, or leaves the model alone."""
    model = monde.offload(
        tiny.build("mixtral"),
        device="cpu",
        mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
        mesh_timeout_s=TIMEOUT_S,
    )
    ids = tiny.prompt(1, 4)
    tiny.greedy(model, ids)
    start_s = time.perf_counter()
    try:
        if dist.get_rank() == 1:
            if how == "die":
                model.model.layers[1].register_forward_pre_hook(lambda *_: os._exit(9))
            else:
                time.sleep(TIMEOUT_S + 3)
                return "left alone", 0.0
        tiny.greedy(model, ids)
    except RuntimeError as error:
        return str(error), time.perf_counter() - start_s
    return "", 0.0


@pytest.mark.parametrize("how", ["die", "leave"])
def test_a_rank_goes_away_mid_step(tmp_path: Path, how: str) -> None:
    told = run_ranks(struck, 3, tmp_path, how, may_die=(1,) if how == "die" else (), deadline_s=60)
    assert told[1] == (None if how == "die" else ("left alone", 0.0))
    for rank in (0, 2):
        text, seconds_s = told[rank]
        assert re.match(rf"mesh: rank {rank} lost the others \(.*\); .* restart all ranks", text), text
        assert seconds_s < 2 * TIMEOUT_S + 3


def crossed() -> tuple[str, float]:
    """Of four ranks in a square two give their row and two their column: none agrees with both it names."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
    mine = world["column" if dist.get_rank() in (0, 3) else "row"]
    start_s = time.perf_counter()
    try:
        monde.offload(tiny.build("mixtral"), device="cpu", mesh=mine, mesh_timeout_s=TIMEOUT_S)
    except RuntimeError as error:
        return str(error), time.perf_counter() - start_s
    return "", 0.0


def test_ranks_of_different_meshes(tmp_path: Path) -> None:
    for text, seconds_s in run_ranks(crossed, 4, tmp_path, deadline_s=60):
        assert re.match(r"mesh: rank \d lost the others \(.*\); ", text), text
        assert seconds_s < 2 * TIMEOUT_S + 5


def odd_batches(how: str) -> float:
    """Worst logits, in bounds, where rank 1 has nothing to ask and feeds one token, or comes late to every layer, but in time."""
    model = monde.offload(
        tiny.build("gpt_oss"), device="cpu", mesh=init_device_mesh("cpu", (2,)), mesh_timeout_s=TIMEOUT_S
    )
    ids = tiny.prompt(2, 20)
    if dist.get_rank() == 1 and how == "none":
        ids = ids[:1, :1]  # transformers' attention knows no empty batch
    if dist.get_rank() == 1 and how == "late":
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda *_: time.sleep(TIMEOUT_S / 4))
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape[:2] == ids.shape
    want = tiny.expected(tiny.build("gpt_oss"), ids)
    return float((logits.double() - want.logits.double()).abs().max()) / want.tolerance


@pytest.mark.parametrize("how", ["none", "late"])
def test_handled(tmp_path: Path, how: str) -> None:
    for worst in run_ranks(odd_batches, 2, tmp_path, how):
        assert worst <= 1


RAISE_TIMEOUT_S = 60.0  # nobody is to wait that long


def raised(how: str) -> tuple[str, float, str]:
    """What this rank was told, after how many seconds, and what the next call says, when rank 1 raises."""
    model = monde.offload(
        tiny.build("mixtral"), device="cpu", mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
        mesh_timeout_s=RAISE_TIMEOUT_S,
    )  # fmt: skip
    ids, rank = tiny.prompt(1, 4), dist.get_rank()
    before = tiny.greedy(model, ids)

    def fail(*_: object) -> None:
        raise ValueError("no more\nmemory")

    if how == "all" or rank == 1:
        place = {"layer": model.model.layers[1], "start": model, "all": model.model.layers[0]}.get(how)
        if place is not None:
            handle = place.register_forward_pre_hook(fail)
    told, start_s = "", time.perf_counter()
    try:
        if how == "sampling":
            processor = [lambda ids, scores: fail() if rank == 1 else scores]
            model.generate(ids, max_new_tokens=3, do_sample=False, logits_processor=processor)
        elif how == "inside":
            moe = model.monde.fronts[1].executor
            compute = moe.sharded.compute
            moe.sharded.compute = fail if rank == 1 else compute
            model(ids)
        else:
            model(ids)
    except (RuntimeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
    seconds_s = time.perf_counter() - start_s
    if how == "all":
        handle.remove()
        return told, seconds_s, str(bool((tiny.greedy(model, ids) == before).all()))
    try:
        model(ids)
    except (RuntimeError, ValueError) as error:
        return told, seconds_s, f"{type(error).__name__}: {error}"
    return told, seconds_s, ""


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("how", ["start", "layer", "inside", "sampling"])
def test_what_a_rank_raises_ends_the_others_waits(tmp_path: Path, how: str, num_ranks: int) -> None:
    """Within 3 seconds of a timeout of 60, in front of the first exchange, between two, within a layer, after a step."""
    told = run_ranks(raised, num_ranks, tmp_path, how, deadline_s=60)
    for rank, (text, seconds_s, then) in enumerate(told):
        heard = "RankError: mesh: rank 1 failed: ValueError: no more memory; mend that and restart all ranks"
        assert text == ("ValueError: no more\nmemory" if rank == 1 else heard)
        assert seconds_s < 3, (rank, seconds_s)
        if rank != 1:
            assert then == heard
        elif how == "start":
            assert then == text
        else:  # it hears of its own failure, or meets a rank that is still in the call before
            assert then == heard or "the ranks are in different calls" in then


def test_what_all_raise_ends_nothing(tmp_path: Path) -> None:
    for text, seconds_s, works in run_ranks(raised, 2, tmp_path, "all"):
        assert text.startswith("ValueError")
        assert seconds_s < 3
        assert works == "True"


def refuses_state_dicts(parallel: str) -> tuple[str, bool]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = monde.offload(tiny.build("qwen3_moe"), device="cpu", mesh=mesh, parallel=parallel)
    before, text = model.state_dict(), ""
    before = {name: tensor.clone() for name, tensor in before.items()}
    other = {name: tensor + 1 for name, tensor in before.items()}
    for module, weights in ((model, other), (model.model.layers[1], {})):
        with pytest.raises(RuntimeError, match="take weights once, at loading") as error:
            module.load_state_dict(weights)
        text += str(error.value)
    after = model.state_dict()
    return text, all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("parallel", ["sharded", "peers"])
def test_a_state_dict_is_refused_before_anything_is_written(parallel: str, tmp_path: Path) -> None:
    for text, is_unchanged in run_ranks(refuses_state_dicts, 2, tmp_path, parallel):
        assert text.startswith("Qwen3MoeForCausalLM: ranks hold parts of these experts")
        assert is_unchanged
