"""Residents that change while decode steps run on the GPU: same text, graphs replay, nothing is torn."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import monde
from monde.models.decode_runner import CAPTURE_AFTER_STEPS
from monde.routing.replay import DynamicSettings
from tests.monde import tiny
from tests.monde.test_residency import RESTLESS, assert_consistent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("hostcompute._native")

NEW = 40
NAMES = ("qwen3_moe", "gpt_oss", "mixtral")  # gpt_oss has biases


def budget_bytes(original: Any, share: float) -> int:
    """gpu_memory that holds this share of the experts."""
    plan = monde.offload(copy.deepcopy(original), max_context=64, max_batch=2).monde.plan
    return int(plan.gpu_used_bytes - plan.slots_bytes + share * plan.size.all_slots_bytes)


def offloaded(original: Any, share: float = 0.5, **settings: Any) -> Any:
    settings = {"residency": "dynamic", "gpu_memory": budget_bytes(original, share)} | settings
    return monde.offload(copy.deepcopy(original), max_context=64, max_batch=2, **settings)


def restless(original: Any, share: float = 0.5) -> Any:
    """Every step may exchange every resident, and all that counts is the step before."""
    model = offloaded(original, share)
    residency = model.monde.residency
    assert all(residency.moves(layer_idx) for layer_idx in range(len(model.monde.layers)))
    assert len(residency._pinned) == len(model.monde.layers)
    residency.settings, residency.swap_share, residency.tracker.keep_per_step = RESTLESS, 1e9, 0.01
    return model


def come_to_rest(engine: Any) -> None:
    """What is under way arrives, and nothing else starts."""
    engine.residency.settings = DynamicSettings(max_swaps=0, interval_steps=1)
    for _ in range(4):  # an exchange comes in so many parts
        torch.cuda.synchronize()
        engine.residency.step()
    assert not engine.residency._mover.is_busy
    torch.cuda.synchronize()


def text(model: Any, ids: Tensor) -> Tensor:
    tokens: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
    )
    return tokens.cpu()


def prompts(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, tiny.VOCABULARY, (2, 12), generator=generator).cuda() for _ in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_soak_of_300_steps(name: str) -> None:
    original = tiny.build(name)
    model, on_host = restless(original), offloaded(original, share=0)
    for idx, ids in enumerate(prompts(8)):
        assert torch.equal(text(model, ids), text(on_host, ids)), f"prompt {idx}"
    counters = model.monde.counters()
    assert on_host.monde.counters().num_resident_pairs == 0
    assert counters.num_swaps > 50
    assert counters.swap_bytes == counters.num_swaps * model.monde.plan.size.layers[0].slot_bytes
    assert 0 < counters.hit_rate < 1
    # Most of the steps were replays of a graph, and the graph holds addresses that are still right.
    runner = model._decode_runner
    assert runner.num_captures == 1
    assert runner.num_replays == 8 * (NEW - 1) - CAPTURE_AFTER_STEPS
    come_to_rest(model.monde)
    assert_consistent(model.monde)
    assert torch.equal(text(model, prompts(1)[0]), text(on_host, prompts(1)[0]))
    # Exact, as swaps only copy.
    state = model.state_dict()
    assert all(torch.equal(state[key].cpu(), tensor) for key, tensor in original.state_dict().items())


def test_bf16_slots_hold_what_tables_say() -> None:
    model = restless(tiny.build("qwen3_moe", torch.bfloat16))
    for ids in prompts(3):
        text(model, ids)
    assert model.monde.counters().num_swaps > 20
    come_to_rest(model.monde)
    assert_consistent(model.monde)


def test_addresses_stay() -> None:
    model = restless(tiny.build("qwen3_moe"))
    residency = model.monde.residency

    def addresses() -> list[int]:
        tables = [table.slot_of_expert_E1.data_ptr() for table in residency.tables]
        blobs = [slots.blobs_SB.data_ptr() for slots in residency.slots]
        heat = [residency.tracker.count_E(layer_idx).data_ptr() for layer_idx in range(len(tables))]
        return tables + blobs + heat

    before = addresses()
    text(model, prompts(1)[0])
    assert model.monde.counters().num_swaps > 0
    assert addresses() == before


def test_prefill_while_everything_moves() -> None:
    """Prompts of more tokens than decode takes: both ways read the same table."""
    original = tiny.build("qwen3_moe")
    model = restless(original)
    generator = torch.Generator().manual_seed(6)
    for _ in range(12):
        ids = torch.randint(3, tiny.VOCABULARY, (2, 50), generator=generator)
        with torch.no_grad():
            tiny.assert_logits(model(ids.cuda()).logits.cpu(), tiny.expected(original, ids))
    assert model.monde.counters().num_swaps > 0
    come_to_rest(model.monde)
    assert_consistent(model.monde)


def test_the_usual_pace_follows_skewed_routing() -> None:
    """At the pace that users get; experts are chosen by hand, so that the right residents are known."""
    engine = offloaded(tiny.build("qwen3_moe")).monde
    favourites = torch.tensor([4, 5, 6, 7], device="cuda")
    x_TD = torch.randn(2, 32, device="cuda")

    def steps(num_steps: int) -> float:
        engine.reset_counters()
        for step in range(num_steps):
            ids_TK = favourites.roll(step)[:2].view(2, 1)
            for layer in engine.layers:
                layer.forward(x_TD, ids_TK, torch.ones(2, 1, device="cuda"))
            torch.cuda.synchronize()  # so that heat arrives within a step
        return float(engine.counters().hit_rate)

    assert steps(4) == 0
    steps(100)
    assert steps(20) == 1
    assert engine.layers[0].table.placement.resident_experts == (4, 5, 6, 7)


def test_without_pinned_memory_residents_still_move(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("4096 bytes could not be pinned: out of memory")

    monkeypatch.setattr("monde.residency.PinnedRange", refuse)
    original = tiny.build("gpt_oss")
    with pytest.warns(RuntimeWarning, match=r"one at a time .* raise `ulimit -l`") as caught:
        model = offloaded(original)
    assert len([w for w in caught if "ulimit" in str(w.message)]) == 1
    residency = model.monde.residency
    residency.settings, residency.tracker.keep_per_step = RESTLESS, 0.01
    ids = prompts(1)[0]
    assert torch.equal(text(model, ids), text(offloaded(original, share=0), ids))
    assert model.monde.counters().num_swaps > 0
    come_to_rest(model.monde)
    assert_consistent(model.monde)


def test_memory_is_unpinned_at_close_and_when_the_model_is_gone() -> None:
    import cupy

    original = tiny.build("mixtral")

    def pinned_addresses(model: Any) -> list[int]:
        return [blobs.address for blobs in model.monde.residency._blobs.values()]

    def is_pinned(address: int) -> bool:
        return int(cupy.cuda.runtime.pointerGetAttributes(address).type) == 1  # cudaMemoryTypeHost

    closed, dropped = offloaded(original), offloaded(original)
    addresses = pinned_addresses(closed) + pinned_addresses(dropped)
    assert len(addresses) == 4
    assert all(is_pinned(address) for address in addresses)
    closed.monde.close()
    closed.monde.close()
    del dropped
    gc.collect()
    assert not any(is_pinned(address) for address in addresses)


def test_heat_file(tmp_path: Path) -> None:
    original, path = tiny.build("qwen3_moe"), tmp_path / "heat.safetensors"
    model = offloaded(original)
    text(model, prompts(1)[0])
    model.monde.save_heat(path)
    hot = offloaded(original, share=0.25, residency="static", heat_file=path)
    cold = offloaded(original, share=0.25, residency="static")
    rates = []
    for m in (hot, cold):
        m.monde.reset_counters()
        text(m, prompts(1)[0])
        rates.append(m.monde.counters().hit_rate)
        assert m.monde.counters().num_swaps == 0
    assert rates[0] > rates[1]
