"""Experts on the GPU, on the host or on both: the same answers within rounding, on a real device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import monde
from tests.hostcompute.bounds import (
    CONFIDENCE,
    HALF_SUBNORMAL,
    UNIT,
    Approximate,
    Expected,
    activated,
    assert_within,
    linear,
    rounded_to_bf16,
)
from tests.monde import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHIPPED = Path(__file__).parents[2] / "assets" / "moe-3m"
PLACES = ("host", "mixed", "gpu")


@pytest.fixture(autouse=True)
def full_fp32() -> Any:
    """TF32 would round fp32 products to 10 bits; torch leaves it off, and the bounds rely on that."""
    assert not torch.backends.cuda.matmul.allow_tf32


def offloaded(original: Any, place: str) -> Any:
    """A copy of `original` run by monde, with none, about half or all of the experts on the GPU."""
    plan = monde.offload(copy.deepcopy(original), max_context=64).monde.plan
    fixed_bytes = plan.gpu_used_bytes - plan.slots_bytes
    share = {"host": 0, "mixed": 0.5, "gpu": 1}[place]
    budget_bytes = fixed_bytes + int(share * plan.slots_bytes)
    return monde.offload(copy.deepcopy(original), max_context=64, gpu_memory=budget_bytes)


@pytest.fixture(params=tiny.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.mark.parametrize("place", PLACES)
def test_fp32(name: str, place: str) -> None:
    original, ids = tiny.build(name), tiny.prompt()
    model = offloaded(original, place)
    check_place(model, place)
    with torch.no_grad():
        tiny.assert_logits(model(ids.cuda()).logits.cpu(), tiny.expected(original, ids))
    assert torch.equal(tiny.greedy(model, ids.cuda()).cpu(), tiny.greedy(original, ids))
    counters = model.monde.counters()
    share = counters.num_resident_pairs / counters.num_pairs
    assert {"host": share == 0, "mixed": 0 < share < 1, "gpu": share == 1}[place]
    assert (counters.h2d_bytes > 0) == (place != "gpu")


def check_place(model: Any, place: str) -> None:
    report = model.monde.load_report
    resident, everything = report.num_resident_experts, report.num_experts
    assert {"host": resident == 0, "mixed": 0 < resident < everything, "gpu": resident == everything}[place]
    assert all(p.is_cuda for p in model.parameters())


@pytest.mark.parametrize("place", PLACES)
def test_bf16_layers(name: str, place: str) -> None:
    """Layer by layer: whole bf16 models choose other experts where two scores nearly tie, and that is no error."""
    original = tiny.build(name, torch.bfloat16)
    model = offloaded(original, place)
    generator = torch.Generator().manual_seed(3)
    for layer_idx, layer in enumerate(model.monde.layers):
        spec = layer.spec
        x_TD = torch.randn(9, spec.d_model, generator=generator).bfloat16()
        ids_TK = torch.randint(-1, spec.num_experts + 1, (9, 3), generator=generator)
        weights_TK = torch.rand(9, 3, generator=generator)
        y_TD = layer.forward(x_TD.cuda(), ids_TK.cuda(), weights_TK.cuda()).cpu()
        assert y_TD.dtype is torch.bfloat16
        want = bf16_expected(model.monde, layer_idx, x_TD, ids_TK, weights_TK)
        assert_within(y_TD.float().numpy(), want, f"{name}, layer {layer_idx}, {place}")


def bf16_expected(engine: Any, layer_idx: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Expected:
    """The float64 answer on the stored weights and its bound, as tests/hostcompute/bounds.py derives it.

    torch rounds the result of every matrix product to bf16, and the hidden values; the host rounds less.
    """
    spec = engine.layers[layer_idx].spec
    x = Approximate(x_TD.double().numpy(), np.zeros(x_TD.shape))
    y_TD, variance_TD = np.zeros(x_TD.shape), np.zeros(x_TD.shape)
    for expert_id in range(spec.num_experts):
        w = {role: t.double().numpy() for role, t in engine.export_expert(layer_idx, expert_id).items()}

        def product(role: str, inputs: Approximate, w: Any = w) -> Approximate:
            return rounded_to_bf16(linear(w[role], inputs, w.get(f"{role}_bias", 0.0)))

        up = product("up", x)
        first, second = (product("gate", x), up) if spec.gated else (up, None)
        v = product("down", rounded_to_bf16(activated(spec, first, second)))
        weight_T1 = torch.where(ids_TK == expert_id, weights_TK.double(), 0).sum(1, keepdim=True).numpy()
        y_TD += weight_T1 * v.value
        variance_TD += (weight_T1 * v.deviation) ** 2
    error_TD = CONFIDENCE * np.sqrt(variance_TD)
    error_TD += UNIT["bf16"] * (np.abs(y_TD) + error_TD) + HALF_SUBNORMAL["bf16"]
    return Expected(y_TD, error_TD)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("place", PLACES)
def test_generate(place: str, cache: str) -> None:
    original, ids = tiny.build("qwen3_moe"), tiny.prompt()
    model = offloaded(original, place)
    settings: dict[str, Any] = {"cache_implementation": cache}
    want = tiny.greedy(original, ids, **settings)
    assert torch.equal(tiny.greedy(model, ids.cuda(), **settings).cpu(), want)


@pytest.mark.parametrize("place", PLACES)
def test_shipped_model(place: str) -> None:
    original = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    with pytest.raises(monde.BudgetError) as error:
        from_shipped(1)
    extra_bytes = {"host": 0, "mixed": 3 * 2**20, "gpu": 100 * 2**20}[place]
    model = from_shipped(error.value.smallest_bytes + extra_bytes)
    check_place(model, place)
    ids = AutoTokenizer.from_pretrained(SHIPPED)("The first step is", return_tensors="pt").input_ids
    with torch.no_grad():
        tiny.assert_logits(model(ids.cuda()).logits.cpu(), tiny.expected(original, ids))
    assert torch.equal(tiny.greedy(model, ids.cuda()).cpu(), tiny.greedy(original, ids))


def from_shipped(gpu_memory: int) -> Any:
    return monde.from_pretrained(str(SHIPPED), dtype=torch.float32, gpu_memory=gpu_memory, max_context=64)


def test_cpu_on_a_machine_with_a_gpu() -> None:
    original, ids = tiny.build("mixtral"), tiny.prompt()
    model = monde.offload(copy.deepcopy(original), device="cpu")
    assert model.device.type == "cpu"
    assert torch.equal(tiny.greedy(model, ids), tiny.greedy(original, ids))


def test_cupy_sees_the_device() -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.arange(10, dtype=cupy.float32)
    assert float((torch.from_dlpack(x) * 2).sum()) == 90
    assert cupy.cuda.runtime.getDeviceCount() == torch.cuda.device_count()
