"""Residents follow the routing though host memory has no copy of them. The CPU stands in for the GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hostcompute import DType, ExpertBank, ExpertSpec, HostPlaces, make_layout
from monde.core import Placement
from monde.executors.exchange import ExchangeMover
from monde.executors.mover import SlotMover
from monde.planning.placement import Swap
from monde.planning.split_policies import all_fetch
from monde.weights.host import HostBlobs
from monde.weights.places import PlacePool, PlaceTable
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable
from tests.monde import tiny
from tests.monde.cancelling import CancelAfter, Cancelled
from tests.monde.eager_capture import with_graphs
from tests.monde.test_packing import random_arrays
from tests.monde.test_residency import (
    assert_consistent,
    come_to_rest,
    prompts,
)
from tests.monde.tight import (
    CPU,
    LateCopies,
    NoCopy,
    assert_whole,
    engine_state,
    poison_free_places,
    tight,
    use,
)

pytest.importorskip("hostcompute._native")


# ---- answers ----
@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_while_everything_is_exchanged(name: str) -> None:
    original = tiny.build(name)
    model = tight(original)
    for ids in prompts(24):
        with torch.no_grad():
            tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
    counters, layer = model.monde.counters(), model.monde.plan.size.layers[0]
    assert counters.num_swaps >= 8
    assert counters.swap_bytes == counters.num_swaps * layer.slot_bytes
    assert counters.d2h_bytes >= counters.num_swaps * layer.expert_bytes
    assert 0 < counters.hit_rate < 1
    model.monde.reset_counters()
    assert model.monde.counters().d2h_bytes == 0


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])  # gpt_oss has biases
def test_nobody_reads_what_is_being_written_or_was_given_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny.build(name)
    model = tight(original, num_spares=1 if name == "gpt_oss" else 3)
    before, late = engine_state(model.monde), LateCopies(patience=2)
    use(model.monde, late)
    poison_free_places(model.monde, monkeypatch)
    for ids in prompts(40):
        with torch.no_grad():
            tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
        assert_whole(model.monde, before)
    assert late.num_late > 20
    assert model.monde.counters().num_swaps > 2


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_prompts_that_fetch_find_experts_where_they_are(name: str) -> None:
    original = tiny.build(name)
    model = tight(original, num_spares=1)
    model.monde.prefill.policy = all_fetch
    generator = torch.Generator().manual_seed(6)
    for _ in range(12):
        ids = torch.randint(3, tiny.VOCABULARY, (2, 50), generator=generator)
        with torch.no_grad():
            tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
    counters = model.monde.counters()
    assert counters.num_swaps > 1
    assert counters.num_fetched_pairs > 0


def test_what_was_fetched_ahead_is_forgotten_before_places_change() -> None:
    """A prompt that ends between a layer and the next leaves shipments; their places may be others' by the next call."""
    original = tiny.build("qwen3_moe")
    model = tight(original)
    model.monde.prefill.policy = all_fetch
    hub, second = model.monde.prefill, model.monde.layers[1]

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    for ids in prompts(12):
        whole, second.forward = second.forward, interrupted
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        second.forward = whole
        exchanged = model.monde.residency._mover.is_busy
        model.monde.residency.step()
        if model.monde.residency._mover.is_busy and not exchanged:
            assert hub._ahead == (-1, [])
        with torch.no_grad():
            tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_text_of_replayed_steps_while_everything_is_exchanged(name: str) -> None:
    original = tiny.build(name)
    model = tight(original)
    with_graphs(model, engine=model.monde)
    for ids in prompts(3):
        wanted = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
        got = model.generate(ids, max_new_tokens=30, **wanted)
        assert torch.equal(got, original.generate(ids, max_new_tokens=30, **wanted))
    assert model._decode_runner.num_replays > 60
    assert model.monde.counters().num_swaps > 10
    come_to_rest(model.monde)
    assert_consistent(model.monde)


def test_cancelled_generations_and_other_models_between() -> None:
    names = ("qwen3_moe", "mixtral")
    originals = [tiny.build(name) for name in names]
    models = [tight(original, num_spares=1) for original in originals]
    before = [engine_state(model.monde) for model in models]
    for model in models:
        use(model.monde, LateCopies(patience=1))
    for idx, ids in enumerate(prompts(10)):
        for model, original, state in zip(models, originals, before, strict=True):
            with pytest.raises(Cancelled):
                tiny.greedy(model, ids, min_new_tokens=12, stopping_criteria=[CancelAfter(idx % 4)])
            assert_whole(model.monde, state)
            assert torch.equal(tiny.greedy(model, ids), tiny.greedy(original, ids))
    assert all(model.monde.counters().num_swaps > 4 for model in models)


# ---- an exchange, step by step ----
def test_an_exchange_in_its_parts() -> None:
    engine = tight(tiny.build("qwen3_moe"), num_spares=1).monde
    residency, late, before = engine.residency, LateCopies(patience=1), engine_state(engine)
    use(engine, late)
    mover, table, places = residency._mover, residency.tables[0], residency._places[0]
    addresses = (table.slot_of_expert_E1.data_ptr(), places.place_of_expert_E.data_ptr())
    (spare,), left = places.pool.free, places.bank.place_of_expert_E[6]
    swap = Swap(0, 1, 1, 6)
    mover.start([swap])
    assert places.pool.free == ()
    assert mover.num_free == 0
    assert mover.finish() == ()  # on its way back, and still in its slot
    assert table.slot_of_expert_E1[1] == 1
    assert_whole(engine, before)
    assert mover.finish() == ()  # back, and out of the slot
    assert places.bank.place_of_expert_E[1] == places.place_of_expert_E[1] == spare
    assert (table.slot_of_expert_E1[1], table.slot_of_expert_E1[6]) == (-1, -1)
    assert_whole(engine, before)
    assert mover.finish() == ()
    assert mover.finish() == [swap]  # the other one has the slot, and its place may still be read
    assert (table.slot_of_expert_E1[1], table.slot_of_expert_E1[6]) == (-1, 1)
    assert places.bank.place_of_expert_E[6] == left
    assert mover.is_busy
    assert_whole(engine, before)
    assert mover.finish() == ()
    assert places.pool.free == ()
    assert mover.finish() == ()
    assert places.pool.free == (left,)
    assert not mover.is_busy
    assert addresses == (table.slot_of_expert_E1.data_ptr(), places.place_of_expert_E.data_ptr())
    assert_whole(engine, before)


@pytest.mark.parametrize("good_copies", [0, 1])
def test_a_copy_that_fails_leaves_everything_whole_and_is_tried_again(good_copies: int) -> None:
    """The first copy is the one back to the host, the second the one into the slot."""
    original = tiny.build("qwen3_moe")
    model = tight(original, num_spares=1)
    engine, late = model.monde, LateCopies(patience=1)
    before, residency = engine_state(engine), engine.residency
    use(engine, late)
    num_failures, ids = 0, prompts(1)[0]
    swap = Swap(0, 1, 1, 6)
    residency._mover.start([swap]) if good_copies else None
    late.fails = 3
    for _ in range(12):
        with contextlib.suppress(NoCopy), torch.no_grad():
            num_failures += 1
            tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
            num_failures -= 1
        assert_whole(engine, before)
    assert num_failures == 3
    for ids in prompts(12):
        with torch.no_grad():
            tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
    assert residency.num_swaps > 0
    late.patience = 0
    come_to_rest(engine)
    assert all(table.placement.num_resident == 4 for table in residency.tables)
    assert_whole(engine, before)


SPECS = (ExpertSpec(6, 37, 53, DType.F16, has_bias=True), ExpertSpec(4, 37, 53, DType.F16, has_bias=True))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_whatever_is_exchanged_every_expert_stays_whole(data: st.DataObject) -> None:
    """Two layers share places; rounds of any swaps, of copies that take any time or fail."""
    num_slots = [data.draw(st.integers(1, spec.num_experts - 1)) for spec in SPECS]
    num_spares = data.draw(st.integers(1, 3))
    num_cold = sum(spec.num_experts - n for spec, n in zip(SPECS, num_slots, strict=True))
    pool = PlacePool(HostPlaces(make_layout(SPECS[0]), num_cold + num_spares))
    tables, places, slots, blobs, arrays = [], {}, {}, {}, {}
    for l, (spec, n) in enumerate(zip(SPECS, num_slots, strict=True)):
        placement = Placement(tuple(e if e < n else -1 for e in range(spec.num_experts)))
        bank = ExpertBank(spec, "native", places=pool.memory)
        tables.append(SlotTable(placement, CPU))
        places[l], slots[l] = PlaceTable(bank, pool, placement, CPU), ExpertSlots(spec, n, CPU)
        blobs[l] = HostBlobs(bank, places[l].place_of_expert_E)
        for e in range(spec.num_experts):
            arrays[l, e] = random_arrays(spec)
            bank.load(e, **arrays[l, e])
            if e < n:
                slots[l].write(e, arrays[l, e])
    late = LateCopies(data.draw(st.integers(0, 2)))
    mover = ExchangeMover(SlotMover(tables, slots, blobs, late), slots, places, blobs, late)

    def assert_all_whole() -> None:
        for (l, e), expert in arrays.items():
            slot = tables[l].placement.slot_of_expert_E[e]
            assert tables[l].slot_of_expert_E1[e] == slot
            if slot >= 0:
                found = slots[l].read(slot)
            else:
                assert places[l].place_of_expert_E[e] == places[l].bank.place_of_expert_E[e] >= 0
                exported = vars(places[l].bank.export(e))
                found = {r: torch.from_numpy(a.numpy()) for r, a in exported.items() if a is not None}
            assert all(torch.equal(found[role].half(), expert[role]) for role in expert), (l, e)

    for _ in range(data.draw(st.integers(1, 12))):
        late.fails = data.draw(st.integers(0, 1))
        if mover.is_busy:
            with contextlib.suppress(NoCopy):
                mover.finish()
        else:
            swaps: list[Swap] = []
            for _ in range(data.draw(st.integers(1, mover.num_free))):
                l = data.draw(st.sampled_from((0, 1)))
                slot_E = tables[l].placement.slot_of_expert_E
                busy = {e for swap in swaps if swap.layer == l for e in (swap.expert_out, swap.expert_in)}
                outs = [e for e, slot in enumerate(slot_E) if slot >= 0 and e not in busy]
                ins = [e for e, slot in enumerate(slot_E) if slot < 0 and e not in busy]
                if outs and ins:
                    out = data.draw(st.sampled_from(outs))
                    swaps.append(Swap(l, out, slot_E[out], data.draw(st.sampled_from(ins))))
            if swaps:
                with contextlib.suppress(NoCopy):
                    mover.start(swaps)
        assert_all_whole()
    late.fails = 0
    for _ in range(20):
        mover.finish()
    assert not mover.is_busy
    assert len(pool.free) == num_spares
    assert [table.placement.num_resident for table in tables] == num_slots
    assert_all_whole()
