"""Layers of prompts: products alone, and whole calls on every way, with the CPU in the GPU's place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("hostcompute._native")

from hostcompute import ExpertBank, ExpertSpec, make_pool
from monde.calibration.host import fill
from monde.calibration.prompts import PromptLayers, resident_products
from monde.calibration.samples import take
from monde.executors.device_part import DevicePart
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import LayerPieces, PrefillSize
from monde.planning.machines import DESCRIBED
from monde.weights.host import HostBlobs
from monde.weights.slots import ExpertSlots

CPU = torch.device("cpu")


def slots_of(bank: ExpertBank) -> ExpertSlots:
    """All of the bank's experts."""
    blobs, slots = HostBlobs(bank), ExpertSlots(bank.spec, bank.spec.num_experts, CPU)
    for e in range(bank.spec.num_experts):
        slots.blobs_SB[e].copy_(blobs.blob_B(e))
    return slots


def test_every_way_of_a_layer_is_timed() -> None:
    spec = ExpertSpec(16, 64, 96)
    bank = fill(ExpertBank(spec, "native", make_pool(1)))
    layers = PromptLayers(bank, slots_of(bank), CPU)
    samples = take(layers.probes(), lambda what: None)
    launches = layers.launches(samples, host_s=0.0, copies_s=0.0)
    assert 0 < launches.plan_s < 1
    assert 0 < launches.layer_s < 1
    assert 0 <= launches.host_s < 1  # Python on a busy machine, taken off a call, may be all of it
    assert 0 <= launches.fetch_s < 1
    assert layers.launches(samples, host_s=8.0, copies_s=8.0).host_s == 0
    assert 0 < launches.resident_s < 1
    fetched, on_host, *on_slots = (
        layers.layers[way] for way in ("fetched", "on the host", "resident", "resident, nothing planned")
    )
    assert fetched.num_fetched_pairs > 0
    assert on_host.totals.num_pairs > 0
    assert fetched.num_resident_pairs == fetched.totals.num_pairs == on_host.num_resident_pairs == 0
    for executor in on_slots:
        assert executor.num_resident_pairs > 0
        assert executor.num_fetched_pairs == executor.totals.num_pairs == 0
    layers.close()
    bank.close()


@pytest.mark.parametrize("piece_rows", [96, 32])
def test_products_alone_are_those_of_a_layer(piece_rows: int) -> None:
    """Of one expert: down(silu(gate x) * up x), piece after piece."""
    spec = ExpertSpec(4, 64, 96)
    with fill(ExpertBank(spec, "native", make_pool(1))) as bank:
        slots = slots_of(bank)
        hub = PrefillHub(CPU, PrefillSize.of([spec], 2, 8, 2), DESCRIBED["h200"])
        size = replace(LayerPieces.of(spec), piece_rows=piece_rows)
        launch, rows = resident_products(DevicePart(spec, slots, size, hub), 5, np.array([1, 2]))
        launch()
        ids_T1 = torch.full((5, 1), 2)
        expected_TD = bank.forward(rows.x_TD, ids_T1, torch.ones(5, 1), out=torch.empty(5, 64).bfloat16())
        for first in (0, 5):  # all places of the bank hold the same expert
            found_TD = rows.v_ND[first : first + 5].bfloat16()
            torch.testing.assert_close(found_TD, expected_TD, rtol=2e-2, atol=2e-3)
        hub.close()
