"""Layers of prompts: products alone, and whole calls on the three ways, with the CPU in the GPU's place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("hostcompute._native")

from hostcompute import ExpertBank, ExpertSpec, make_pool
from monde.calibration.host import fill
from monde.calibration.prompts import PromptLayers, ResidentProducts, layer_seconds
from monde.calibration.samples import take
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import PrefillSize
from monde.planning.machines import DESCRIBED
from monde.weights.host import HostBlobs
from monde.weights.slots import ExpertSlots

CPU = torch.device("cpu")


def test_every_way_of_a_layer_is_timed() -> None:
    layers = PromptLayers(64, make_pool(1), CPU)
    samples = take(layers.probes(), lambda what: None)
    seconds = layer_seconds(samples)
    assert set(seconds) == {"resident", "on the host", "fetched"}
    assert all(0 < s < 1 for s in seconds.values())
    fetching, on_slots = layers.layers[False], layers.layers[True]
    assert fetching.num_fetched_pairs > 0
    assert fetching.totals.num_pairs > 0
    assert fetching.num_resident_pairs == on_slots.num_fetched_pairs == on_slots.totals.num_pairs == 0
    layers.close()


@pytest.mark.parametrize("piece_rows", [96, 32])
def test_products_alone_are_those_of_a_layer(piece_rows: int) -> None:
    """Of one expert: down(silu(gate x) * up x), piece after piece."""
    spec = ExpertSpec(4, 64, 96)
    with fill(ExpertBank(spec, "native", make_pool(1))) as bank:
        blobs, slots = HostBlobs(bank), ExpertSlots(spec, 4, CPU)
        for e in range(4):
            slots.blobs_SB[e].copy_(blobs.blob_B(e))
        hub = PrefillHub(CPU, PrefillSize.of([spec], 2, 8, 2), DESCRIBED["h200"])
        products = ResidentProducts(spec, slots, hub, piece_rows)
        rows = products.rows(5, products.order(5, np.array([2, 1])))
        products.launches(5, np.array([2, 1]), rows)()
        ids_T1 = torch.full((5, 1), 2)
        expected_TD = bank.forward(rows.x_TD, ids_T1, torch.ones(5, 1), out=torch.empty(5, 64).bfloat16())
        for first in (0, 5):  # all places of the bank hold the same expert
            torch.testing.assert_close(rows.v_ND[first : first + 5], expected_TD, rtol=2e-2, atol=2e-3)
        hub.close()
