"""load_state_dict of a model that monde runs: as before monde, wherever the experts lie."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import monde
from tests.monde import tiny
from tests.monde.test_residency import assert_consistent, come_to_rest, prompts, restless
from tests.monde.tight import LateCopies, tight, use

EXPERTS = "model.layers.1.mlp.experts"


def other_weights(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of a model of the same kind, with other values everywhere."""
    state: dict[str, Tensor] = tiny.build(name, dtype).state_dict()
    return {key: tensor.flip(0) * 1.25 + 0.01 for key, tensor in state.items()}


def differing(model: Any, want: dict[str, Tensor]) -> list[str]:
    got = model.state_dict()
    assert got.keys() == want.keys()
    return [key for key in want if got[key].dtype != want[key].dtype or not torch.equal(got[key], want[key])]


@pytest.mark.parametrize("gpu_memory", [0, "40KB"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_other_weights_give_the_other_models_answers(
    name: str, gpu_memory: Any, way: Any, checkpoints: Any
) -> None:
    want, original = other_weights(name), tiny.build(name)
    original.load_state_dict(want)
    model = way(checkpoints(name, sharded=True), gpu_memory=gpu_memory, residency="static")
    model(tiny.prompt())
    assert str(model.load_state_dict(want)) == "<All keys matched successfully>"
    assert differing(model, want) == []
    same = monde.offload(copy.deepcopy(original), device="cpu", gpu_memory=gpu_memory, residency="static")
    assert torch.equal(model(tiny.prompt()).logits, same(tiny.prompt()).logits)
    with torch.no_grad():
        tiny.assert_logits(model(tiny.prompt()).logits, tiny.expected(original, tiny.prompt()))


@pytest.mark.parametrize("keeps_copies", [True, False])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_in_the_middle_of_swaps(name: str, keeps_copies: bool) -> None:
    pytest.importorskip("hostcompute._native")
    original, want = tiny.build(name), other_weights(name)
    model = restless(original) if keeps_copies else tight(original)
    engine, num_under_way = model.monde, 0
    if not keeps_copies:
        use(engine, LateCopies(patience=1))
    for ids in prompts(14):
        model(ids)
        num_under_way += engine.residency._mover.is_busy
        for weights in (original.state_dict(), want):
            model.load_state_dict(weights)
            assert not engine.residency._mover.is_busy
            assert differing(model, weights) == []
    assert num_under_way > 0
    assert engine.counters().num_swaps > 0
    come_to_rest(engine)
    assert_consistent(engine)
    assert differing(model, want) == []


def test_values_are_cast_to_the_models_type() -> None:
    original, want = tiny.build("mixtral", torch.bfloat16), other_weights("mixtral")
    model = monde.offload(copy.deepcopy(original), device="cpu", gpu_memory="20KB")
    model.load_state_dict(want)
    original.load_state_dict(want)
    assert differing(model, original.state_dict()) == []


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_the_state_dict_may_change_afterwards(backend: str) -> None:
    want = other_weights("qwen3_moe")
    model = monde.offload(tiny.build("qwen3_moe"), device="cpu", cpu_backend=backend)
    model.load_state_dict(want)
    before = model(tiny.prompt()).logits
    for tensor in want.values():
        tensor.fill_(7)
    assert torch.equal(model(tiny.prompt()).logits, before)


def test_what_is_wrong_is_said_as_torch_says_it_and_changes_no_expert_of_the_layer() -> None:
    original = tiny.build("qwen3_moe")
    model, before = monde.offload(copy.deepcopy(original), device="cpu"), tiny.build("qwen3_moe").state_dict()
    down, gate_up = f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj"
    cut = {**other_weights("qwen3_moe"), down: before[down][:, :, :-1]}
    with pytest.raises(
        RuntimeError, match=rf"size mismatch for {down}: .*\[8, 32, 23\].*\[8, 32, 24\]"
    ) as got:
        model.load_state_dict(cut)
    with pytest.raises(RuntimeError) as want:
        original.load_state_dict(cut)
    assert str(got.value) == str(want.value)
    damaged = other_weights("qwen3_moe")
    damaged[gate_up][5, 3, 1] = float("nan")
    with pytest.raises(RuntimeError, match=f"{EXPERTS}, expert 5: gate has a weight that is NaN"):
        model.load_state_dict(damaged)
    after = model.state_dict()
    assert torch.equal(after[down], before[down])
    assert torch.equal(after[gate_up], before[gate_up])


def test_missing_and_unexpected_keys_are_torchs() -> None:
    original, want = tiny.build("qwen3_moe"), other_weights("qwen3_moe")
    model = monde.offload(copy.deepcopy(original), device="cpu")
    gate_up = want.pop(f"{EXPERTS}.gate_up_proj")
    want[f"{EXPERTS}.bias"] = gate_up
    told = []
    for one in (original, model):
        with pytest.raises(
            RuntimeError, match=r"Missing key.*gate_up_proj.*\n.*Unexpected key.*bias"
        ) as error:
            one.load_state_dict(want)
        told.append(str(error.value))
    assert told[0] == told[1]
    assert model.load_state_dict(want, strict=False) == original.load_state_dict(want, strict=False)
    assert differing(model, original.state_dict()) == []
