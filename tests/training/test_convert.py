"""transformers models with sharded experts: the same outputs and gradients as their own, and back again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from monde.planning.pipeline import Degrees
from monde.training.convert import convert, converted_experts, restore
from tests.distributed.ranks import run_ranks
from tests.monde import tiny
from tests.training.reference import assert_close, packed, unpacked

IDS = tiny.prompt(batch=4, length=10)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1]
    total: Tensor = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
    )
    return total


def eager(name: str, dtype: torch.dtype) -> Any:
    model = tiny.build(name).to(dtype)
    model.set_experts_implementation("eager")
    return model.train()


def grads(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def on_rank(names: tuple[str, ...], mesh_shape: tuple[int, ...]) -> bytes:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("node", "local")[: len(mesh_shape)])
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    answers = {}
    for name in names:
        model = convert(tiny.build(name).train(), mesh, schedule=Degrees(2, 3))
        mine = IDS[rank * 4 // size : (rank + 1) * 4 // size]
        logits = model(mine).logits.detach()
        loss_of(model, mine).backward()
        dense = {n: g for n, g in grads(model).items() if ".weights." not in n}
        for module in converted_experts(model):  # gradients travel the way back as values would
            for param in module.weights.parameters():
                param.data = torch.zeros_like(param) if param.grad is None else param.grad
        restored = restore(model)
        experts = {n: p.detach().clone() for n, p in restored.named_parameters() if ".experts." in n}
        answers[name] = (logits, dense, experts)
    return packed(answers)


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 2)], ids=str)
def test_outputs_and_gradients_are_those_of_the_model(mesh_shape: tuple[int, ...], tmp_path: Path) -> None:
    size = torch.Size(mesh_shape).numel()
    by_rank = [
        unpacked(sent) for sent in run_ranks(on_rank, size, tmp_path, tiny.NAMES, mesh_shape, deadline_s=200)
    ]
    for name in tiny.NAMES:
        same, exact = eager(name, torch.float32), eager(name, torch.float64)
        logits = {}
        for model in (same, exact):
            logits[model] = model(IDS).logits.detach()
            loss_of(model, IDS).backward()
        got = torch.cat([answers[name][0] for answers in by_rank])
        assert_close(f"{name} logits", got, logits[exact], logits[same])
        for param, grad in grads(exact).items():
            if ".experts." in param and ".shared" not in param:
                value = by_rank[0][name][2][param]
            else:
                value = sum(answers[name][1][param] for answers in by_rank)
            assert_close(f"{name} {param}", value, grad, grads(same)[param])


def test_back_and_forth_is_exact() -> None:
    model = tiny.build("gpt_oss")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    after = restore(convert(model)).state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_single_block() -> None:
    block = tiny.build("mixtral").model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    want = block(x)
    torch.testing.assert_close(convert(block)(x), want)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="no experts on transformers' experts interface"):
        convert(tiny.dense())
