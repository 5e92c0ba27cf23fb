"""gpu_memory is a promise: the peak that torch measures stays below it through loading, prefill and decode."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import monde

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 2**20
CONTEXT, BATCH = 1024, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """260 MB of experts and 30 MB of dense weights, so that every term of the arithmetic counts."""
    folder = tmp_path_factory.mktemp("budget")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        moe_intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=28,
        num_experts_per_tok=4,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def clean_device() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def measured_peak_bytes(run: Callable[[], None]) -> int:
    """Growth of allocated device memory at its worst while `run` runs."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before_bytes


def use(model: Any, length: int, cache: str | None, batch: int = BATCH, num_new: int = 8) -> None:
    """The longest use that the budget was computed for; without a `cache` it is monde's, whose steps are captured."""
    ids = torch.randint(3, 8192, (batch, length - num_new), device=model.device)
    settings: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}
    if cache == "static":
        settings["disable_compile"] = True
    mask = torch.ones_like(ids)
    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )


def smallest_bytes(folder: Path, **settings: Any) -> int:
    with pytest.raises(monde.BudgetError) as error:
        load(folder, 1, **settings)
    return error.value.smallest_bytes


def load(folder: Path, gpu_memory: int, **settings: Any) -> Any:
    sizes: dict[str, Any] = {"max_context": CONTEXT, "max_batch": BATCH}
    return monde.from_pretrained(str(folder), gpu_memory=gpu_memory, **sizes | settings)


def cupy_pool_bytes() -> int:
    """What CuPy's own pool holds on the device; kernels and pinned memory are not of it."""
    import cupy

    return int(cupy.get_default_memory_pool().total_bytes())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("extra_mib", [0, 100, 1000], ids=["no-expert", "some-experts", "all-experts"])
def test_peak_stays_within_the_budget(folder: Path, extra_mib: int, cache: str) -> None:
    budget_bytes = smallest_bytes(folder) + extra_mib * MIB
    models: list[Any] = []
    loading_bytes = measured_peak_bytes(lambda: models.append(load(folder, budget_bytes)))
    (model,) = models
    report = model.monde.load_report
    assert (report.num_resident_experts > 0) == (extra_mib > 0)
    assert (report.num_resident_experts == report.num_experts) == (extra_mib == 1000)
    assert loading_bytes <= budget_bytes, model.monde.plan.explain()
    # What is resident counts too: use grows from there.
    held_bytes = report.dense_bytes + model.monde.plan.slots_bytes
    used_bytes = measured_peak_bytes(lambda: use(model, CONTEXT, cache))
    assert held_bytes + used_bytes <= budget_bytes, model.monde.plan.explain()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_any_budget_is_kept(folder: Path, seed: int) -> None:
    """Any budget, context and batch: loading, the longest prompt and decode together stay within it.

    From before the model is there to after its longest use.
    """
    pytest.importorskip("cupy", exc_type=ImportError)
    rng = random.Random(seed)
    context, batch = rng.randint(64, 2048), rng.randint(1, 6)
    settings: dict[str, Any] = {
        "max_context": context,
        "max_batch": batch,
        "residency": rng.choice(["dynamic", "static"]),
    }
    # From no expert at all to a third more than all of them take.
    budget_bytes = smallest_bytes(folder, **settings) + int(rng.random() ** 2 * 350 * MIB)
    models: list[Any] = []

    def load_and_use() -> None:
        models.append(load(folder, budget_bytes, **settings))
        use(models[0], context, None, batch, num_new=16)
        use(models[0], min(context, 64), "dynamic", batch)

    before_bytes = cupy_pool_bytes()
    peak_bytes = measured_peak_bytes(load_and_use) + cupy_pool_bytes() - before_bytes
    plan = models[0].monde.plan
    assert peak_bytes <= budget_bytes, f"{settings}: {peak_bytes - budget_bytes} too much\n{plan.explain()}"
    models[0].monde.close()


def test_offload_moves_no_more_than_the_budget(folder: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(folder)
    budget_bytes = smallest_bytes(folder) + 50 * MIB
    settings = {"gpu_memory": budget_bytes, "max_context": CONTEXT, "max_batch": BATCH}
    peak_bytes = measured_peak_bytes(lambda: use(monde.offload(original, **settings), CONTEXT, "dynamic"))
    assert 0 < original.monde.load_report.num_resident_experts < original.monde.load_report.num_experts
    assert peak_bytes <= budget_bytes, original.monde.plan.explain()


def test_zero_is_legal_only_on_the_cpu(folder: Path) -> None:
    with pytest.raises(monde.BudgetError, match=r'short by .* or use device="cpu"'):
        load(folder, 0)
    model = monde.from_pretrained(str(folder), gpu_memory=0, device="cpu")
    assert model.monde.load_report.num_resident_experts == 0


def test_more_than_the_device_is_refused(folder: Path) -> None:
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(ValueError, match=r"gpu_memory: .* is more than the .* of cuda:0; ask for less"):
        load(folder, total_bytes + 1)


def test_cpu_touches_no_device_memory(folder: Path) -> None:
    def run() -> None:
        model = monde.from_pretrained(str(folder), device="cpu")
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        use(model, 40, "dynamic")

    assert measured_peak_bytes(run) == 0
