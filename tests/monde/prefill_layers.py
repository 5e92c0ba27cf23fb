"""Layers for tests of the prefill path on any device: the same experts in slots, staging and host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hostcompute import ExpertBank, ExpertSpec
from monde.core import Placement, RoutedBatch
from monde.device.pinned import PinnedRange
from monde.executors.prefill import PrefillExecutor
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import PrefillSize
from monde.planning.cost import CostModel
from monde.planning.machines import DESCRIBED
from monde.planning.profile import HardwareProfile, PromptLaunches
from monde.planning.split import ExpertSplit, Lanes, Load, best_split
from monde.planning.split_policies import SplitPolicy, all_fetch, all_host
from monde.weights.host import HostBlobs
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable
from tests.hostcompute.bounds import (
    CONFIDENCE,
    HALF_SUBNORMAL,
    UNIT,
    Approximate,
    Expected,
    activated,
    assert_within,
    linear,
)
from tests.hostcompute.cases import Batch, load_all, make_expert

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def half_and_half(load: Load, cost: CostModel) -> ExpertSplit:
    lanes = Lanes(load, cost)
    return lanes.split(len(lanes.order) // 2)


def cut_one(load: Load, cost: CostModel) -> ExpertSplit:
    """Half fetched and, where F allows it, the next one cut after its first rows."""
    lanes = Lanes(load, cost)
    k = len(lanes.order) // 2
    can_cut = k < len(lanes.order) and cost.shape.d_ffn > 32
    return lanes.split(k, 32 if can_cut else 0)


POLICIES: dict[str, SplitPolicy] = {
    "best": best_split,
    "host": all_host,
    "fetch": all_fetch,
    "mixed": half_and_half,
    "cut": cut_one,
}


@dataclass
class Layers:
    """Layers of one model that share a hub."""

    specs: list[ExpertSpec]
    experts: list[dict[int, Any]]
    hub: PrefillHub
    executors: list[PrefillExecutor]
    pinned: list[PinnedRange]

    def close(self) -> None:
        self.hub.close()
        for one in self.pinned:
            one.close()


def torch_array(array: Any) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array.numpy()))
    return tensor.view(torch.bfloat16) if array.dtype == "bf16" else tensor


def launching_for_nothing(profile: HardwareProfile) -> HardwareProfile:
    """Experts of tests are so small that launching a fetch would never pay."""
    assert profile.gpu is not None
    return replace(profile, gpu=replace(profile.gpu, prompt=PromptLaunches.none()))


def build(
    specs: Sequence[ExpertSpec],
    residents: Sequence[Sequence[int]],
    device: torch.device,
    policy: SplitPolicy = best_split,
    seed: int = 0,
    num_tokens: int = 4096,
    deadline_s: float = 20.0,
    pool: Any = None,
) -> Layers:
    """Native banks with all experts; `residents` have slots besides."""
    rng = np.random.default_rng(seed)
    size = PrefillSize.of(specs, 4, num_tokens, 32)
    hub = PrefillHub(device, size, launching_for_nothing(DESCRIBED["h200"]), policy, deadline_s)
    layers = Layers(list(specs), [], hub, [], [])
    for layer_idx, (spec, resident) in enumerate(zip(specs, residents, strict=True)):
        experts = {e: make_expert(rng, spec, "separate") for e in range(spec.num_experts)}
        bank = load_all(ExpertBank(spec, "native", pool=pool), experts)
        table = [resident.index(e) if e in resident else -1 for e in range(spec.num_experts)]
        slots = ExpertSlots(spec, len(resident), device) if resident else None
        for slot, e in enumerate(resident):
            assert slots is not None
            slots.write(slot, {role: torch_array(a) for role, a in experts[e].items()})
        blobs = HostBlobs(bank)
        if device.type == "cuda":
            layers.pinned.append(PinnedRange(blobs.address, blobs.num_bytes, blobs, device))
        slot_table = SlotTable(Placement(tuple(table)), device)
        executor = PrefillExecutor(layer_idx, bank, slots, slot_table, hub, lambda blobs=blobs: blobs)
        layers.executors.append(executor)
        layers.experts.append(experts)
    return layers


def routed(batch: Batch, device: torch.device) -> RoutedBatch:
    ids_TK = torch.from_numpy(batch.ids_TK.astype(np.int64))
    parts = (torch_array(batch.x_TD), ids_TK, torch_array(batch.weights_TK))
    return RoutedBatch(*(t.to(device) for t in parts))


def check(
    layers: Layers, layer_idx: int, batch: Batch, x_dtype: str, what: str, expected: Expected | None = None
) -> None:
    """Against the float64 oracle, `expected` where somebody has asked it already."""
    y_TD = layers.executors[layer_idx].forward(routed(batch, layers.hub.lanes.device))
    assert y_TD.dtype == TORCH[x_dtype], y_TD.dtype
    if expected is None:
        expected = library_bound(layers.specs[layer_idx], layers.experts[layer_idx], batch, x_dtype)
    assert_within(y_TD.float().cpu().numpy(), expected, what)


def check_wide(layers: Layers, batch: Batch, x_dtype: str, what: str) -> None:
    """Sums that stay in fp32, as ranks exchange them: within the bound, and not rounded to x's type."""
    y_TD = layers.executors[0].forward(routed(batch, layers.hub.lanes.device), torch.float32)
    assert y_TD.dtype == torch.float32
    assert (y_TD != y_TD.to(TORCH[x_dtype]).float()).any(), what
    expected = library_bound(layers.specs[0], layers.experts[0], batch, x_dtype)
    assert_within(y_TD.cpu().numpy(), expected, what)


def library_bound(spec: ExpertSpec, experts: dict[int, Any], batch: Batch, x_dtype: str) -> Expected:
    """tests.hostcompute.bounds, with what the libraries' products round besides.

    They are computed in the wider of the two types, and in bf16 and fp16 every product and the hidden values are
    rounded to it. A cut expert's two parts of v are rounded apart: each is a sum of some of the F terms, whose size is
    that of v or the root of the sum of their squares. The host, with bf16 dots, rounds x and h and no product.
    """
    dtype = torch.promote_types(TORCH[x_dtype], TORCH[spec.dtype.value])
    unit, half = (0.0, 0.0) if dtype is torch.float32 else _ROUNDING[dtype]

    def rounded(x: Approximate, largest: Any = 0.0) -> Approximate:
        size = np.hypot(np.abs(x.value), largest)
        return Approximate(x.value, np.hypot(x.deviation, unit * size) + half)

    ids_TK, weights_TK = batch.ids_TK.astype(np.int64), batch.weights_TK.float32().astype(np.float64)
    x = batch.x_TD.float32().astype(np.float64)
    y_TD, variance_TD, largest_TD = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for e in {int(i) for i in ids_TK.ravel()} & set(experts):
        w = {name: array.float32().astype(np.float64) for name, array in experts[e].items()}
        its = np.flatnonzero((ids_TK == e).any(1))
        inputs = Approximate(x[its], np.zeros_like(x[its]))
        up = rounded(linear(w["up"], inputs, w.get("up_bias", 0.0)))
        gate = rounded(linear(w["gate"], inputs, w.get("gate_bias", 0.0))) if spec.gated else None
        h = rounded(activated(spec, up if gate is None else gate, None if gate is None else up))
        size = np.sqrt(h.value**2 @ (w["down"] ** 2).T)
        v = rounded(linear(w["down"], h, w.get("down_bias", 0.0)), size)
        weight_TK = np.where(ids_TK[its] == e, weights_TK[its], 0)
        weight_T1 = weight_TK.sum(1, keepdims=True)
        y_TD[its] += weight_T1 * v.value
        variance_TD[its] += (weight_T1 * v.deviation) ** 2
        largest_TD[its] += np.abs(weight_TK).sum(1, keepdims=True) * np.abs(v.value)
    variance_TD += (ids_TK.shape[1] + 2) * (UNIT["f32"] * largest_TD) ** 2
    error_TD = CONFIDENCE * np.sqrt(variance_TD)
    error_TD += UNIT[x_dtype] * (np.abs(y_TD) + error_TD) + HALF_SUBNORMAL[x_dtype]
    return Expected(y_TD, error_TD)


_ROUNDING = {
    torch.bfloat16: (UNIT["bf16"], HALF_SUBNORMAL["bf16"]),
    torch.float16: (UNIT["f16"], HALF_SUBNORMAL["f16"]),
}
