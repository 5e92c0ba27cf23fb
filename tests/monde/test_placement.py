"""Moving experts between host and device changes time, never the answer beyond rounding.

The CPU stands in for the GPU: with device="cpu" and gpu_memory above 0, residents take its code path.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hostcompute import Activation, ActivationKind, DType, ExpertBank, ExpertSpec
from monde.core import Placement
from monde.executors.host import HostExecutor
from monde.executors.prefill import PrefillExecutor
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import PrefillSize
from monde.layer import MoELayer
from monde.planning.machines import DESCRIBED
from monde.weights.slots import ExpertSlots
from monde.weights.staging import Staging
from monde.weights.table import SlotTable
from tests.monde import tiny

CPU = torch.device("cpu")


def _layer(spec: ExpertSpec, resident: list[int], weights: list[dict[str, torch.Tensor]]) -> MoELayer:
    table = [resident.index(e) if e in resident else -1 for e in range(spec.num_experts)]
    slot_table = SlotTable(Placement(tuple(table)), CPU)
    bank, slots = ExpertBank(spec, "reference"), ExpertSlots(spec, max(1, len(resident)), CPU)
    for e, arrays in enumerate(weights):
        if table[e] >= 0:
            slots.write(table[e], arrays)
        else:
            bank.load(e, **arrays)
    hub = PrefillHub(CPU, PrefillSize.of([spec], 4, 64, 4), DESCRIBED["h200"])
    device = PrefillExecutor(0, bank, slots, slot_table, hub, lambda: None) if resident else None
    return MoELayer(spec, slot_table, HostExecutor(bank, Staging(pinned=False)), device)


def _random_weights(spec: ExpertSpec) -> list[dict[str, torch.Tensor]]:
    D, F = spec.d_model, spec.d_ffn
    shapes: dict[str, tuple[int, ...]] = {"up": (F, D), "down": (D, F)}
    if spec.gated:
        shapes["gate"] = (F, D)
    if spec.has_bias:
        shapes |= {"up_bias": (F,), "down_bias": (D,)} | ({"gate_bias": (F,)} if spec.gated else {})
    return [{role: torch.randn(shape) for role, shape in shapes.items()} for _ in range(spec.num_experts)]


@settings(max_examples=40, deadline=None)
@given(
    resident=st.lists(st.integers(0, 5), unique=True, max_size=6),
    kind=st.sampled_from(list(ActivationKind)),
    gated=st.booleans(),
    bias=st.booleans(),
    num_tokens=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_any_placement_gives_the_same_answer(
    resident: list[int], kind: ActivationKind, gated: bool, bias: bool, num_tokens: int, seed: int
) -> None:
    gated = gated or kind.needs_gate
    torch.manual_seed(seed)
    spec = ExpertSpec(6, 16, 24, DType.F32, gated, Activation(kind, limit=2.0), bias)
    weights = _random_weights(spec)
    x_TD, topk_weights_TK = torch.randn(num_tokens, 16), torch.rand(num_tokens, 3)
    topk_ids_TK = torch.randint(-1, 8, (num_tokens, 3))  # -1, 6 and 7 name no expert
    topk_weights_TK[torch.rand(num_tokens, 3) < 0.2] = 0
    want = _layer(spec, [], weights).forward(x_TD, topk_ids_TK, topk_weights_TK)
    got = _layer(spec, resident, weights).forward(x_TD, topk_ids_TK, topk_weights_TK)
    # fp32 against float64: each product sum of n terms errs by at most n * eps * the sum of absolute values,
    # here n = D + F + 2 K, and no partial sum exceeds the norm-wise product of its factors by more than
    # sqrt(n).
    eps, terms = torch.finfo(torch.float32).eps, 16 + 24 + 6
    scale = max(1.0, float(want.abs().max()) if num_tokens else 1.0) * terms**0.5
    assert (got - want).abs().max().item() <= terms * eps * scale if num_tokens else got.shape == want.shape


@pytest.mark.parametrize("name", tiny.NAMES)
def test_whole_model(name: str, way: Any, checkpoints: Any) -> None:
    folder, ids = checkpoints(name), tiny.prompt()
    original = tiny.build(name)
    want = tiny.expected(original, ids)
    text = tiny.greedy(original, ids)
    all_slots_bytes = way(folder).monde.plan.size.all_slots_bytes
    residents = []
    for share in (0, 0.3, 0.6, 1):
        model = way(folder, gpu_memory=int(share * all_slots_bytes))
        residents.append(model.monde.load_report.num_resident_experts)
        with torch.no_grad():
            tiny.assert_logits(model(ids).logits, want)
        assert torch.equal(tiny.greedy(model, ids), text)
        counters = model.monde.counters()
        assert (counters.num_resident_pairs == counters.num_pairs) == (share == 1)
    assert residents == sorted(set(residents))
    assert residents[-1] == model.monde.load_report.num_experts
