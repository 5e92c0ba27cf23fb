"""Weights, memory and plans of models whose residents have no copy on the host. The CPU stands in for the GPU."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

import monde
from hostcompute import make_layout
from tests.monde import tiny
from tests.monde.test_residency import (
    RESTLESS,
    dynamic,
    prompts,
)
from tests.monde.tight import (
    LateCopies,
    host_memory,
    tight,
    use,
)

pytest.importorskip("hostcompute._native")


# ---- weights ----
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_weights_come_back_exactly_in_the_middle_of_exchanges(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    original = tiny.build(name, dtype)
    model = tight(original)
    use(model.monde, LateCopies(patience=1))
    for idx, ids in enumerate(prompts(14)):
        model(ids)
        if idx >= 7:
            state = model.state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in original.state_dict().items()), idx
    assert model.monde.counters().num_swaps > 0
    assert model.num_parameters() == original.num_parameters()
    model.save_pretrained(tmp_path)
    again = type(original).from_pretrained(tmp_path).state_dict()
    assert again.keys() == original.state_dict().keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in original.state_dict().items())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    original = tiny.build(name)
    original.save_pretrained(tmp_path)
    plan = dynamic(original).monde.plan
    wanted = {"device": "cpu", "gpu_memory": plan.gpu_bytes, "host_memory": host_memory(original, 2)}
    model = monde.from_pretrained(tmp_path, **wanted)
    report = model.monde.load_report
    assert model.monde.plan.num_spare_places == 2
    assert report.num_released_experts == report.num_resident_experts > 0
    assert report.saved_host_bytes == model.monde.plan.saved_bytes > 0
    use(model.monde, LateCopies(patience=1))
    residency = model.monde.residency
    residency.settings, residency.swap_share, residency.tracker.keep_per_step = RESTLESS, 1e9, 0.01
    for ids in prompts(10):
        with torch.no_grad():
            tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
    assert residency.num_swaps > 0


def test_a_weight_that_is_not_finite_is_found_in_residents_too() -> None:
    original = tiny.build("mixtral")
    with torch.no_grad():
        original.model.layers[1].mlp.experts.down_proj[0, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"expert 0: .*NaN or infinite: down\[3, 4\]"):
        tight(original, num_spares=1)


# ---- memory ----
def test_host_memory_holds_what_the_plan_says_and_no_more() -> None:
    original = tiny.build("qwen3_moe")
    blob_bytes = make_layout(dynamic(original).monde.layers[0].spec).blob_bytes
    for num_spares in (1, 3, 7):
        engine = tight(original, num_spares).monde
        pools = {table.pool for table in engine.residency._places.values()}
        assert len(pools) == 1
        assert next(iter(pools)).memory.num_bytes == (8 + num_spares) * blob_bytes  # of 16 experts
        assert engine.plan.host_used_bytes <= engine.plan.host_bytes
        assert engine.plan.num_released == 8
        held_bytes = sum(layer.host.bank.resident_bytes for layer in engine.layers)
        assert held_bytes == 8 * make_layout(engine.layers[0].spec).weight_bytes
    with pytest.raises(AssertionError):
        tight(original, num_spares=8)  # room for all copies: as ever
    engine = dynamic(original, host_memory=host_memory(original, 8)).monde
    assert not engine.residency._places
    assert engine.plan.num_released == engine.load_report.num_released_experts == 0


def test_without_a_spare_place_residents_stay() -> None:
    original = tiny.build("gpt_oss")
    enough = host_memory(original, 1)
    short = r"static, as host_memory is short by 1 B of a place .* give host_memory="
    with pytest.warns(RuntimeWarning, match=f"{short}{enough}"):
        engine = dynamic(original, host_memory=enough - 1).monde
    assert engine.plan.num_released == 0
    assert not any(engine.residency.moves(layer_idx) for layer_idx in range(2))


def test_too_small_says_by_how_much_after_releasing() -> None:
    original = tiny.build("qwen3_moe")
    least = dynamic(original, residency="static").monde.plan.host_used_bytes
    with pytest.raises(monde.BudgetError, match="is short by 1000 B") as error:
        dynamic(original, host_memory=least - 1000)
    assert (error.value.short_bytes, error.value.smallest_bytes) == (1000, least)
    with pytest.warns(RuntimeWarning, match="static, as host_memory is short by"):
        dynamic(original, host_memory=least)


@pytest.mark.parametrize("residency", ["lru", "static", "uniform"])
def test_other_policies(residency: str) -> None:
    original = tiny.build("qwen3_moe")
    model = dynamic(original, host_memory=host_memory(original, 1), residency=residency)
    assert model.monde.plan.num_spare_places == (residency == "lru")
    for ids in prompts(16):
        with torch.no_grad():
            tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
    assert (model.monde.counters().num_swaps > 0) == (residency == "lru")


def test_a_dropped_model_is_gone() -> None:
    model = tight(tiny.build("mixtral"), num_spares=1)
    model(prompts(1)[0])
    pool = weakref.ref(model.monde.residency._places[0].pool)
    del model
    gc.collect()
    assert pool() is None
