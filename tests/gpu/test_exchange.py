"""Residents follow the routing on a GPU though host memory has no copy of them."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

import monde
from tests.gpu.test_residency import NAMES, NEW, budget_bytes, come_to_rest, offloaded, prompts, text
from tests.monde import tiny
from tests.monde.test_exchange import assert_whole, engine_state
from tests.monde.test_residency import RESTLESS, assert_consistent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("hostcompute._native")


def host_memory(original: Any, num_spares: int) -> int:
    """What the experts without a slot take, with so many spare places."""
    plan = offloaded(original, residency="static").monde.plan
    layer = plan.size.layers[0]
    kept_bytes = sum(plan.num_resident_L) * layer.kept_bytes
    return int(plan.host_used_bytes + kept_bytes + num_spares * layer.expert_bytes)


def loaded_tight(original: Any, num_spares: int = 2) -> Any:
    """Every step may exchange as many residents as there are spare places."""
    model = offloaded(original, host_memory=host_memory(original, num_spares))
    assert model.monde.plan.num_spare_places == num_spares
    residency = model.monde.residency
    residency.settings, residency.swap_share, residency.tracker.keep_per_step = RESTLESS, 1e9, 0.01
    return model


def tight(original: Any, num_spares: int = 2) -> Any:
    model = loaded_tight(original, num_spares)
    assert len(model.monde.residency._pinned) == len(model.monde.layers)
    return model


@pytest.mark.parametrize("num_spares", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_text_while_everything_is_exchanged(name: str, num_spares: int) -> None:
    original = tiny.build(name)
    model, on_host = tight(original, num_spares), offloaded(original, share=0)
    for idx, ids in enumerate(prompts(8)):
        assert torch.equal(text(model, ids), text(on_host, ids)), f"prompt {idx}"
    counters, layer = model.monde.counters(), model.monde.plan.size.layers[0]
    assert counters.num_swaps > 20
    assert counters.swap_bytes == counters.num_swaps * layer.slot_bytes
    assert 0 < counters.hit_rate < 1
    assert model._decode_runner.num_replays > 4 * NEW
    come_to_rest(model.monde)
    assert_consistent(model.monde)
    state = model.state_dict()
    assert all(torch.equal(state[key].cpu(), tensor) for key, tensor in original.state_dict().items())


def test_experts_are_whole_whenever_somebody_asks() -> None:
    original = tiny.build("qwen3_moe", torch.bfloat16)
    model = tight(original)
    before, num_busy = engine_state(model.monde), 0
    for ids in prompts(20):
        text(model, ids[:, :2])
        num_busy += model.monde.residency._mover.is_busy
        assert_whole(model.monde, before)
    assert num_busy > 0
    assert model.monde.counters().num_swaps > 20


def test_addresses_stay() -> None:
    model = tight(tiny.build("qwen3_moe"))
    residency = model.monde.residency

    def addresses() -> list[int]:
        tables = [table.slot_of_expert_E1.data_ptr() for table in residency.tables]
        places = [table.place_of_expert_E.data_ptr() for table in residency._places.values()]
        return tables + places + [blobs.address for blobs in residency._blobs.values()]

    before = addresses()
    text(model, prompts(1)[0])
    assert model.monde.counters().num_swaps > 0
    assert addresses() == before


def test_prompts_while_everything_is_exchanged() -> None:
    """Prompts of more tokens than decode takes, which fetch from wherever experts are."""
    original = tiny.build("qwen3_moe")
    model = tight(original)
    generator = torch.Generator().manual_seed(6)
    for _ in range(12):
        ids = torch.randint(3, tiny.VOCABULARY, (2, 50), generator=generator)
        with torch.no_grad():
            tiny.assert_logits(model(ids.cuda()).logits.cpu(), tiny.expected(original, ids))
    assert model.monde.counters().num_swaps > 0


def test_all_places_are_pinned_and_unpinned() -> None:
    import cupy

    def is_pinned(address: int) -> bool:
        return int(cupy.cuda.runtime.pointerGetAttributes(address).type) == 1  # cudaMemoryTypeHost

    model = tight(tiny.build("mixtral"), num_spares=1)
    pool = model.monde.residency._places[0].pool
    places = [pool.memory.address + p * pool.memory.blob_bytes for p in range(pool.memory.num_places)]
    assert all(map(is_pinned, places))
    text(model, prompts(1)[0])
    model.monde.close()
    assert not any(map(is_pinned, places))
    del model, pool
    gc.collect()


def test_without_pinned_memory_residents_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("4096 bytes could not be pinned: out of memory")

    monkeypatch.setattr("monde.residency.PinnedRange", refuse)
    original = tiny.build("gpt_oss")
    with pytest.warns(RuntimeWarning, match=r"residents stay as they are, .* raise `ulimit -l`"):
        model = loaded_tight(original, num_spares=1)
    ids = prompts(1)[0]
    assert torch.equal(text(model, ids), text(offloaded(original, share=0), ids))
    assert model.monde.counters().num_swaps == 0


def test_both_budgets_are_kept() -> None:
    """The least of both memories that lets residents move; a byte less of the host's and they stay."""
    original = tiny.build("qwen3_moe")
    sizes: dict[str, Any] = {"max_context": 64, "max_batch": 2, "gpu_memory": budget_bytes(original, 0.5)}
    enough = host_memory(original, 1)
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    model = monde.offload(copy.deepcopy(original), host_memory=enough, **sizes)
    text(model, prompts(1)[0])
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before_bytes <= sizes["gpu_memory"]
    assert model.monde.plan.releases
    with pytest.warns(RuntimeWarning, match=f"static, as host_memory is short by .* host_memory={enough}"):
        monde.offload(copy.deepcopy(original), host_memory=enough - 1, **sizes)
