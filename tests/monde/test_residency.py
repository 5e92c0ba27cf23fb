"""Residents follow the routing, and answers do not depend on it. The CPU stands in for the GPU."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import monde
from monde.device.copies import Arrival, InOrderCopies
from monde.executors.mover import SlotMover
from monde.planning.placement import Swap
from monde.routing.heat import Heat
from monde.routing.replay import DynamicSettings
from tests.monde import tiny
from tests.monde.eager_capture import with_graphs

pytest.importorskip("hostcompute._native")

RESTLESS = DynamicSettings(interval_steps=1, max_swaps=1000, hysteresis=0.0, sees_chance=False, min_gain=0.0)


def slots_bytes(original: Any) -> int:
    """Device memory of all experts."""
    plan = monde.offload(copy.deepcopy(original), device="cpu").monde.plan
    return int(plan.size.all_slots_bytes)


def dynamic(original: Any, share: float = 0.5, **settings: Any) -> Any:
    """A copy of `original` with a share of the experts in slots that follow the routing."""
    gpu_memory = int(share * slots_bytes(original))
    wanted = {"device": "cpu", "gpu_memory": gpu_memory, "residency": "dynamic"} | settings
    return monde.offload(copy.deepcopy(original), **wanted)


def restless(original: Any, share: float = 0.5) -> Any:
    """Every step may exchange every resident, and all that counts is the step before."""
    model = dynamic(original, share)
    residency = model.monde.residency
    residency.settings, residency.swap_share, residency.tracker.keep_per_step = RESTLESS, 1e9, 0.01
    return model


def come_to_rest(engine: Any) -> None:
    """What is under way arrives, and nothing else starts."""
    engine.residency.settings = DynamicSettings(max_swaps=0, interval_steps=1)
    for _ in range(4):  # an exchange comes in so many parts
        engine.residency.step()
    assert not engine.residency._mover.is_busy


def assert_consistent(engine: Any) -> None:
    """Tables say the same on both sides, and every slot holds, bit for bit, the expert that they name."""
    for layer_idx, layer in enumerate(engine.layers):
        entries = layer.table.slot_of_expert_E1.tolist()
        assert entries[:-1] == list(layer.table.placement.slot_of_expert_E)
        assert entries[-1] == -1
        assert sorted(slot for slot in entries if slot >= 0) == list(range(layer.device.slots.num_slots))
        for expert_id, slot in enumerate(entries[:-1]):
            if slot >= 0:
                here, there = layer.device.slots.read(slot), engine.export_expert(layer_idx, expert_id)
                assert here.keys() == there.keys()
                assert all(torch.equal(here[role].cpu(), there[role]) for role in here), (
                    layer_idx,
                    expert_id,
                )


def prompts(count: int) -> list[Tensor]:
    """Of few tokens each, so that the routing differs from one to the next."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, tiny.VOCABULARY, (1, 4), generator=generator) for _ in range(count)]


# ---- answers ----
@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_while_everything_moves(name: str) -> None:
    original = tiny.build(name)
    model = restless(original)
    for ids in prompts(24):
        with torch.no_grad():
            tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
    counters = model.monde.counters()
    assert counters.num_swaps >= 24
    assert counters.swap_bytes == counters.num_swaps * model.monde.plan.size.layers[0].slot_bytes
    assert 0 < counters.hit_rate < 1
    model.monde.reset_counters()
    assert model.monde.counters().num_swaps == model.monde.counters().swap_bytes == 0


def test_text_while_everything_moves() -> None:
    original, ids = tiny.build("qwen3_moe"), tiny.prompt()
    model = restless(original)
    assert torch.equal(tiny.greedy(model, ids), tiny.greedy(original, ids))
    assert model.monde.counters().num_swaps >= 8


def test_loaded_in_one_mode_and_run_in_others() -> None:
    original = tiny.build("mixtral")
    with torch.inference_mode():
        model = restless(original)
    modes = (torch.no_grad, torch.inference_mode)
    for idx, ids in enumerate(prompts(9)):
        with torch.no_grad():
            want = tiny.expected(original, ids)
        with modes[idx % 2]():
            tiny.assert_logits(model(ids).logits, want)
    assert model.monde.counters().num_swaps > 0


def test_a_dropped_model_is_gone() -> None:
    """On a GPU its memory must not stay pinned."""
    model = restless(tiny.build("mixtral"))
    model(prompts(1)[0])
    residency, bank = weakref.ref(model.monde.residency), weakref.ref(model.monde.layers[0].host.bank)
    del model
    gc.collect()
    assert residency() is None
    assert bank() is None


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_text_of_replayed_steps_while_everything_moves(name: str) -> None:
    """The engine hears of replays by before_replay, as of captured steps on a GPU."""
    original = tiny.build(name)
    model = restless(original)
    with_graphs(model, engine=model.monde)
    for ids in prompts(3):
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
        got = model.generate(ids, max_new_tokens=30, **settings)
        assert torch.equal(got, original.generate(ids, max_new_tokens=30, **settings))
    assert model._decode_runner.num_replays > 60
    assert model.monde.counters().num_swaps > 20
    come_to_rest(model.monde)
    assert_consistent(model.monde)


def test_a_record_of_routing_has_every_step() -> None:
    """Replays write nothing down, so there are none meanwhile; what was said before and after is not in it."""
    model = restless(tiny.build("qwen3_moe"))
    with_graphs(model, engine=model.monde)
    ids = tiny.prompt(2, 5)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, max_new_tokens=30, **settings)
    num_replays = model._decode_runner.num_replays
    with model.monde.record_routing() as recorder:
        assert torch.equal(model.generate(ids, max_new_tokens=30, **settings), expected)
        with pytest.raises(RuntimeError, match="another record"), model.monde.record_routing():
            pass
    assert model._decode_runner.num_replays == num_replays
    model.generate(ids, max_new_tokens=30, **settings)
    assert model._decode_runner.num_replays > num_replays
    shapes = [[layer.shape for layer in step] for step in recorder.finish().steps]
    assert shapes == [[(10, 3)] * 2] + [[(2, 3)] * 2] * 29


class LateCopies(InOrderCopies):
    """Slots hold NaN from the start of a copy until it was asked for `patience` times."""

    def __init__(self, patience: int) -> None:
        self.patience, self.num_late = patience, 0

    def to_device(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        for target, _ in pairs:
            target.view(torch.uint8).fill_(0xFF)
        late, kept = self, list(pairs)

        class Late:
            asked = 0

            def done(self) -> bool:
                self.asked += 1
                late.num_late += 1
                return self.asked > late.patience

            def order(self) -> None:
                for target, source in kept:
                    target.copy_(source)

        return Late()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_nobody_reads_a_slot_that_is_being_written(name: str) -> None:
    original = tiny.build(name)
    model = restless(original)
    residency, late = model.monde.residency, LateCopies(patience=3)
    residency._mover = SlotMover(residency.tables, residency._movable, residency._blobs, late)
    for ids in prompts(24):
        with torch.no_grad():
            tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
    assert late.num_late > 10
    assert model.monde.counters().num_swaps > 0


def test_a_swap_in_three_parts() -> None:
    engine = restless(tiny.build("qwen3_moe")).monde
    residency, late = engine.residency, LateCopies(patience=1)
    mover = SlotMover(residency.tables, residency._movable, residency._blobs, late)
    table = residency.tables[0]
    assert table.placement.slot_of_expert_E[:2] == (0, 1)
    address = table.slot_of_expert_E1.data_ptr()
    swap = Swap(0, 1, 1, 6)
    mover.start([swap])
    assert (table.slot_of_expert_E1[1], table.slot_of_expert_E1[6]) == (-1, -1)
    assert residency.slots[0].blobs_SB[1].min() == 255
    assert mover.finish() == ()
    assert table.slot_of_expert_E1[6] == -1
    assert mover.finish() == [swap]
    assert not mover.is_busy
    assert (table.slot_of_expert_E1[1], table.slot_of_expert_E1[6]) == (-1, 1)
    assert table.slot_of_expert_E1.data_ptr() == address
    assert_consistent(engine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_weights_come_back_exactly_after_swaps(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    original = tiny.build(name, dtype)
    model = restless(original)
    for ids in prompts(8):
        model(ids)
    assert model.monde.counters().num_swaps > 0
    come_to_rest(model.monde)
    assert_consistent(model.monde)
    model.save_pretrained(tmp_path)
    again = type(original).from_pretrained(tmp_path)
    for state in (model.state_dict(), again.state_dict()):
        assert state.keys() == original.state_dict().keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in original.state_dict().items())


# ---- following the routing ----
def route(engine: Any, favourites: list[int], num_steps: int) -> float:
    """Steps in which nine of ten tokens go to `favourites`; the share of pairs that met a slot."""
    generator = torch.Generator().manual_seed(0)
    engine.reset_counters()
    for _ in range(num_steps):
        for layer in engine.layers:
            spec = layer.spec
            x_TD = torch.randn(4, spec.d_model, generator=generator)
            hot = torch.tensor(favourites)[torch.randint(len(favourites), (4, 1), generator=generator)]
            any_one = torch.randint(spec.num_experts, (4, 1), generator=generator)
            ids_TK = torch.where(torch.rand(4, 1, generator=generator) < 0.9, hot, any_one)
            layer.forward(x_TD, ids_TK, torch.ones(4, 1))
    return float(engine.counters().hit_rate)


def test_hits_rise_and_follow_a_change() -> None:
    engine = dynamic(tiny.build("qwen3_moe"), share=0.4).monde
    num_slots = engine.layers[0].device.slots.num_slots
    assert num_slots == 3
    cold, other = [5, 6, 7], [0, 3, 4]
    assert route(engine, cold, 4) < 0.2
    route(engine, cold, 60)
    assert route(engine, cold, 40) > 0.85
    assert engine.counters().num_swaps <= 4  # hysteresis: the placement is at rest
    route(engine, other, 120)
    assert route(engine, other, 40) > 0.85


def test_lru_holds_what_was_used_last() -> None:
    engine = dynamic(tiny.build("qwen3_moe"), share=0.4, residency="lru").monde
    generator = torch.Generator().manual_seed(1)
    last: list[int] = []
    for _ in range(20):
        expert = int(torch.randint(8, (1,), generator=generator))
        last = [expert, *(other for other in last if other != expert)]
        for _ in range(2):  # the second time what was read back after the first has moved
            for layer in engine.layers:
                layer.forward(torch.ones(1, layer.spec.d_model), torch.tensor([[expert]]), torch.ones(1, 1))
    come_to_rest(engine)
    for layer in engine.layers:
        residents = set(layer.table.placement.resident_experts)
        assert len(residents) == 3
        assert set(last[:2]) <= residents  # the third may still be on its way


def test_static_and_uniform_do_not_move() -> None:
    for residency in ("static", "uniform"):
        engine = dynamic(tiny.build("qwen3_moe"), residency=residency).monde
        engine.residency.settings = RESTLESS
        route(engine, [5, 6, 7], 20)
        counters = engine.counters()
        assert counters.num_swaps == counters.swap_bytes == 0
        assert engine.layers[0].table.placement.resident_experts == (0, 1, 2, 3)
        # and their residents are in memory once
        assert engine.layers[0].host.bank.loaded_experts == {4, 5, 6, 7}


def test_layers_without_a_choice_do_not_move() -> None:
    original = tiny.build("qwen3_moe")
    for share in (0, 1):
        engine = dynamic(original, share).monde
        engine.residency.settings = RESTLESS
        route(engine, [5], 5)
        assert engine.counters().num_swaps == 0
        assert all(len(layer.host.bank.loaded_experts) == 8 * (1 - share) for layer in engine.layers)


# ---- host memory ----
def test_residency_is_static_where_host_memory_is_tight() -> None:
    original = tiny.build("qwen3_moe")
    plan = dynamic(original, residency="static").monde.plan
    fits = plan.host_used_bytes
    needs = dynamic(original).monde.plan.host_used_bytes
    assert needs - fits == sum(
        n * layer.expert_bytes for n, layer in zip(plan.num_resident_L, plan.size.layers, strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = dynamic(original, host_memory=needs)
    assert enough.monde.plan.explain().endswith("residency: follows the routing")
    spare = fits + plan.size.layers[0].expert_bytes
    with pytest.warns(RuntimeWarning, match=f"static, as host_memory is short by .* host_memory={spare}"):
        tight = dynamic(original, host_memory=spare - 1)
    assert f"give host_memory={spare}" in tight.monde.plan.explain()
    assert tight.monde.plan.host_used_bytes == fits
    assert tight.monde.layers[0].host.bank.loaded_experts == {4, 5, 6, 7}
    tight.monde.residency.settings = RESTLESS
    for ids in prompts(6):
        with torch.no_grad():
            tiny.assert_logits(tight(ids).logits, tiny.expected(original, ids))
    assert tight.monde.counters().num_swaps == 0


def test_backends_of_another_form_are_static() -> None:
    with pytest.warns(RuntimeWarning, match='residency is static: .* use cpu_backend="native"'):
        engine = dynamic(tiny.build("mixtral"), cpu_backend="reference").monde
    assert "residency" not in engine.plan.explain()
    assert not any(engine.residency.moves(layer_idx) for layer_idx in range(2))


# ---- heat files ----
def test_a_heat_file_decides_who_starts_resident(tmp_path: Path) -> None:
    original, path = tiny.build("qwen3_moe"), tmp_path / "heat.safetensors"
    engine = dynamic(original, residency="static").monde
    route(engine, [5, 6], 30)
    engine.save_heat(path)
    heat = Heat.load(path)
    # 4 pairs a step and layer; the longer half-life forgets, the rate stays
    assert [float(hits_E.sum()) for hits_E in heat.hits_per_step_L] == pytest.approx([4, 4], rel=0.05)
    for residency in ("static", "uniform", "dynamic"):
        model = dynamic(original, share=0.25, residency=residency, heat_file=path)
        assert all({5, 6} <= set(layer.table.placement.resident_experts) for layer in model.monde.layers)
        assert route(model.monde, [5, 6], 3) > 0.8
        with torch.no_grad():
            tiny.assert_logits(model(tiny.prompt()).logits, tiny.expected(original, tiny.prompt()))
    # It counts on from there.
    np.testing.assert_allclose(
        [h.sum() for h in dynamic(original, heat_file=path).monde.residency.heat().count_L],
        [count_E.sum() * 0.5 ** (4 / 32) for count_E in heat.count_L],
        rtol=1e-5,
    )


def test_slots_go_to_the_layers_that_need_them(tmp_path: Path) -> None:
    original, path = tiny.build("qwen3_moe"), tmp_path / "heat.safetensors"
    counts = (np.full(8, 1, np.float32), np.array([0] * 7 + [1], np.float32))
    Heat("", counts, 1.0).save(path)
    engine = dynamic(original, share=9 / 16, residency="static", heat_file=str(path)).monde
    assert engine.plan.num_resident_L == (8, 1)
    assert engine.layers[1].table.placement.resident_experts == (7,)
    engine = dynamic(original, share=0.5, residency="uniform", heat_file=str(path)).monde
    assert engine.plan.num_resident_L == (4, 4)


def test_before_any_routing_hotter_layers_get_slots_first() -> None:
    """A layer of 4 experts beside one of 8, two a token: each of the 4 is taken twice as often."""
    original = tiny.build("olmoe")
    second, config = original.model.layers[1], original.config
    torch.manual_seed(3)
    config.num_experts = 4
    second.mlp = few = type(second.mlp)(config).eval()
    config.num_experts = 8
    for param in few.parameters():
        torch.nn.init.normal_(param, std=0.1)
    want, ids = tiny.expected(original, tiny.prompt()), tiny.prompt()
    model = dynamic(original, share=0.5, residency="static")
    assert model.monde.plan.num_resident_L == (2, 4)
    with torch.no_grad():
        tiny.assert_logits(model(ids).logits, want)
    assert dynamic(original, share=0.5, residency="uniform").monde.plan.num_resident_L == (3, 3)


def test_heat_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "heat.safetensors"
    engine = dynamic(tiny.build("mixtral"), residency="static").monde
    engine.save_heat(path)
    with pytest.raises(ValueError, match="has 2 layers of 4 experts, this model has 2 of 8; record"):
        dynamic(tiny.build("qwen3_moe"), heat_file=path)
    engine = monde.offload(tiny.build("mixtral"), device="cpu").monde
    with pytest.raises(ValueError, match=r"nothing is counted unless model.monde.watch_heat\(\) asks for it"):
        engine.save_heat(path)
    engine.watch_heat()
    engine.save_heat(path)
    dynamic(tiny.build("mixtral"), heat_file=path)


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(
        ValueError, match="residency: expected one of dynamic, lru, static, uniform, got 'lfu'"
    ):
        monde.MondeConfig(residency="lfu")
