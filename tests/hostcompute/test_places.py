"""Banks that share host memory with places for fewer experts than they have."""

from __future__ import annotations

import numpy as np
import pytest

from hostcompute import DType, ExpertBank, ExpertSpec, HostPlaces, make_layout
from hostcompute.places import NOWHERE
from tests.hostcompute.cases import forward, make_batch, make_expert

pytest.importorskip("hostcompute._native")

SPEC = ExpertSpec(4, 24, 40, DType.BF16, has_bias=True)


def test_an_expert_computes_the_same_wherever_it_lies() -> None:
    rng = np.random.default_rng(0)
    experts = {e: make_expert(rng, SPEC, "separate") for e in range(4)}
    batch = make_batch(rng, SPEC, 5, 2)
    batch.ids_TK[...] = batch.ids_TK % 3
    places = HostPlaces(make_layout(SPEC), 4)
    own, bank = ExpertBank(SPEC, "native"), ExpertBank(SPEC, "native", places=places)
    for expert_id in range(3):
        bank.place(expert_id, 3 - expert_id)
    for expert_id, expert in experts.items():
        own.load(expert_id, **expert)
        bank.load(expert_id, **expert)
    assert bank.loaded_experts == {0, 1, 2}  # expert 3 has left its biases alone
    assert 0 < bank.resident_bytes < own.resident_bytes
    want = forward(own, batch)
    assert np.array_equal(forward(bank, batch), want)
    assert list(bank.place_of_expert_E) == [3, 2, 1, NOWHERE]
    exported = bank.export(1)
    bank.place(1, NOWHERE)
    with pytest.raises(KeyError, match=r"1.*never loaded"):
        bank.export(1)
    bank.place(1, 2, is_filled=True)  # its bytes are there still
    assert np.array_equal(bank.export(1).up.numpy(), exported.up.numpy())
    assert np.array_equal(forward(bank, batch), want)
    bank.release(1)
    assert bank.place_of_expert_E[1] == NOWHERE


def test_memory_outlives_whoever_made_it() -> None:
    rng = np.random.default_rng(1)
    banks = [ExpertBank(SPEC, "native", places=HostPlaces(make_layout(SPEC), 1)) for _ in range(2)]
    expert = make_expert(rng, SPEC, "separate")
    for bank in banks:
        bank.place(2, 0)
        bank.load(2, **expert)
    banks.pop(0).close()
    assert np.array_equal(banks[0].export(2).down.numpy(), expert["down"].numpy())


def test_what_cannot_be_is_refused() -> None:
    layout = make_layout(SPEC)
    bank = ExpertBank(SPEC, "native", places=HostPlaces(layout, 2))
    with pytest.raises(ValueError, match=r"\[place\] place: expected -1..1, got 2"):
        bank.place(0, 2)
    with pytest.raises(ValueError, match=r"\[place\] expert_id: expected 0..3, got 4"):
        bank.place(4, 0)
    with pytest.raises(ValueError, match=r"places of its own; build it with ExpertBank\(places="):
        ExpertBank(SPEC, "native").place(0, 0)
    with pytest.raises(ValueError, match='need the native backend, this is reference; use backend="native"'):
        ExpertBank(SPEC, "reference", places=HostPlaces(layout, 2))
    with pytest.raises(ValueError, match=f"expected {layout.blob_bytes} bytes each, got"):
        ExpertBank(SPEC, "native", places=HostPlaces(make_layout(ExpertSpec(4, 240, 400)), 2))
    with pytest.raises(ValueError, match=r"HostPlaces: .* this machine has"):
        HostPlaces(make_layout(ExpertSpec(1, 65536, 65536)), 1000)
    bank.close()
    with pytest.raises(RuntimeError, match="closed"):
        bank.place(0, 0)
