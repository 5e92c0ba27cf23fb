"""Which experts get a slot on the GPU: over all layers, by seconds saved per byte, under a budget in bytes.

value_L: one array per layer, value_L[l][e] >= 0 the seconds per step that a slot for expert e saves; layers may
differ in experts and in bytes of one. Anything comparable over layers will do as a value: `time_saved_s` makes
seconds from heat, a step of last use makes least-recently-used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monde.core import Placement
from monde.planning.budget import LayerSize, spread_slots
from monde.planning.cost import CostModel

Values = Sequence[NDArray[np.floating]]


def time_saved_s(hits_per_step_E: NDArray[np.floating], cost: CostModel) -> NDArray[np.float64]:
    """Expected seconds a step that each expert's slot saves, when its tokens arrive independently.

    An expert is read once a step if any token comes, with probability 1 - exp(-hits).
    """
    hits_E = np.asarray(hits_per_step_E, np.float64)
    active_E = -np.expm1(-hits_E)
    tokens_E = np.divide(hits_E, active_E, out=np.zeros_like(hits_E), where=active_E > 0)
    return active_E * np.maximum(cost.host_s(tokens_E) - cost.resident_s(tokens_E), 0.0)


def place_by_time(
    hits_per_step_L: Values, cost_L: Sequence[CostModel], layers: Sequence[LayerSize], budget_bytes: int
) -> tuple[Placement, ...]:
    """The placement that saves most seconds a step, of experts with these expected tokens a step; as place."""
    value_L = [time_saved_s(hits_E, cost) for hits_E, cost in zip(hits_per_step_L, cost_L, strict=True)]
    return place(value_L, layers, budget_bytes)


def equal_hits(num_experts: int, num_topk: int, num_tokens: int) -> NDArray[np.float64]:
    """The prior before any routing was seen: tokens a step of every expert of a layer if all are equally popular."""
    return np.full(num_experts, num_tokens * num_topk / num_experts)


def place(value_L: Values, layers: Sequence[LayerSize], budget_bytes: int) -> tuple[Placement, ...]:
    """The placement of greatest total value that fits; exact.

    Experts of one size are taken by value: their best n are a prefix. Over the distinct sizes, of which a model has
    one or two, all counts are tried but for the last size, which takes what is left. Among equal values every layer
    gets its first expert before any gets its second. Errors: ValueError for values that do not match `layers`, and for
    a budget below zero.
    """
    _check(value_L, layers)
    if budget_bytes < 0:
        raise ValueError(f"place: expected a budget of at least 0 bytes, got {budget_bytes}")
    sizes = sorted({layer.slot_bytes for layer in layers}, reverse=True)
    queues = [_queue(value_L, [l for l, layer in enumerate(layers) if layer.slot_bytes == s]) for s in sizes]
    counts = _knapsack([queue.total for queue in queues], sizes, budget_bytes)
    resident = [(int(l), int(e)) for q, n in zip(queues, counts, strict=True) for l, e in q.experts[:n]]
    return _placements(resident, layers)


def place_uniform(
    layers: Sequence[LayerSize], budget_bytes: int, value_L: Values | None = None
) -> tuple[Placement, ...]:
    """Slots spread evenly over the layers; within a layer the best by value, else the first experts."""
    if value_L is None:
        value_L = [np.zeros(layer.num_experts) for layer in layers]
    _check(value_L, layers)
    return best_experts(value_L, spread_slots(tuple(layers), budget_bytes))


def best_experts(value_L: Values, num_slots_L: Sequence[int]) -> tuple[Placement, ...]:
    """In every layer the most valuable experts get the slots; among equals the first."""
    best = [np.argsort(-v_E, kind="stable")[:n] for v_E, n in zip(value_L, num_slots_L, strict=True)]
    slots = [np.full(len(value_E), -1) for value_E in value_L]
    for slot_E, experts in zip(slots, best, strict=True):
        slot_E[experts] = np.arange(len(experts))
    return tuple(Placement(tuple(slot_E.tolist())) for slot_E in slots)


@dataclass(frozen=True)
class Swap:
    """In `layer`, expert_in takes the slot of expert_out."""

    layer: int
    expert_out: int
    slot: int
    expert_in: int


def plan_swaps(
    current: Sequence[Placement], value_L: Values, max_swaps: int, hysteresis: float, min_gain: float = 0.0
) -> list[Swap]:
    """At most `max_swaps`, the greatest gain first; a layer keeps its number of slots.

    In each layer the i-th coldest resident meets the i-th hottest of the others and goes if that one's value is
    above (1 + hysteresis) times its own by more than min_gain. With neither no other set of as many swaps gains more. After the
    swaps are made, the same values give no swap among those exchanged: plans are stable.
    """
    num_layers, width = len(current), max((len(p.slot_of_expert_E) for p in current), default=0)
    slot_LE = np.full((num_layers, width), -1)
    value_LE = np.full((num_layers, width), -np.inf)
    for l, (placement, value_E) in enumerate(zip(current, value_L, strict=True)):
        slot_LE[l, : len(value_E)] = placement.slot_of_expert_E
        value_LE[l, : len(value_E)] = value_E
    out_LE = np.where(slot_LE >= 0, value_LE, np.inf)
    in_LE = np.where(slot_LE >= 0, -np.inf, value_LE)
    coldest_LE, hottest_LE = (
        np.argsort(out_LE, axis=1, kind="stable"),
        np.argsort(-in_LE, axis=1, kind="stable"),
    )
    cold_LE, hot_LE = np.take_along_axis(out_LE, coldest_LE, 1), np.take_along_axis(in_LE, hottest_LE, 1)
    worth_LE = np.isfinite(cold_LE) & np.isfinite(hot_LE) & (hot_LE > cold_LE * (1 + hysteresis) + min_gain)
    layers, ranks = np.nonzero(worth_LE)
    gains = hot_LE[layers, ranks] - cold_LE[layers, ranks]
    best = np.argsort(-gains, kind="stable")[:max_swaps]
    outs, ins = coldest_LE[layers, ranks], hottest_LE[layers, ranks]
    return [Swap(int(layers[i]), int(outs[i]), int(slot_LE[layers[i], outs[i]]), int(ins[i])) for i in best]


def swap_limit(
    current: Sequence[Placement],
    hits_per_step_L: Values,
    layers: Sequence[LayerSize],
    num_steps: int,
    share: float,
) -> int:
    """Swaps in `num_steps` whose copies read at most `share` of what the host reads for its experts meanwhile.

    The host reads an expert with h tokens a step with probability 1 - exp(-h). At least 1, so that a nearly perfect
    placement can still follow the routing.
    """
    read_bytes = 0.0
    for placement, hits_E, layer in zip(current, hits_per_step_L, layers, strict=True):
        cold_E = placement.slot_E < 0
        read_bytes += float(-np.expm1(-np.asarray(hits_E, np.float64)[cold_E]).sum()) * layer.slot_bytes
    largest_bytes = max((layer.slot_bytes for layer in layers), default=1)
    return max(1, int(min(share * num_steps * read_bytes / largest_bytes, 2**31)))


def apply_swaps(current: Sequence[Placement], swaps: Sequence[Swap]) -> tuple[Placement, ...]:
    """The placement after `swaps`."""
    slots = [list(placement.slot_of_expert_E) for placement in current]
    for swap in swaps:
        assert slots[swap.layer][swap.expert_out] == swap.slot
        slots[swap.layer][swap.expert_out] = -1
        slots[swap.layer][swap.expert_in] = swap.slot
    return tuple(Placement(tuple(slot_E)) for slot_E in slots)


@dataclass(frozen=True)
class _Queue:
    """Experts of one size, the most valuable first; total[n] is the value of the first n."""

    experts: NDArray[np.int64]  # (N, 2): layer, expert
    total: NDArray[np.float64]


def _queue(value_L: Values, layer_ids: Sequence[int]) -> _Queue:
    layer, rank, expert, value = [], [], [], []
    for l in layer_ids:
        order = np.argsort(-value_L[l], kind="stable")
        layer.append(np.full(len(order), l))
        rank.append(np.arange(len(order)))
        expert.append(order)
        value.append(value_L[l][order].astype(np.float64))
    values = np.concatenate(value)
    order = np.lexsort((np.concatenate(layer), np.concatenate(rank), -values))
    experts = np.stack([np.concatenate(layer), np.concatenate(expert)], axis=1)[order]
    return _Queue(experts, np.concatenate([[0.0], np.cumsum(values[order])]))


def _knapsack(totals: Sequence[NDArray[np.float64]], sizes: Sequence[int], budget_bytes: int) -> list[int]:
    """How many of each size: the greatest sum of totals[g][n_g] with sum of n_g * sizes[g] <= budget."""
    counts_MG = np.zeros((1, 0), np.int64)
    used_M, value_M = np.zeros(1, np.int64), np.zeros(1)
    for g, (total, size_bytes) in enumerate(zip(totals, sizes, strict=True)):
        most_M = np.minimum((budget_bytes - used_M) // max(size_bytes, 1), len(total) - 1)
        if g == len(sizes) - 1:
            value_M = value_M + total[most_M]
            best = int(np.argmax(value_M))
            return [*counts_MG[best].tolist(), int(most_M[best])]
        parent = np.repeat(np.arange(len(used_M)), most_M + 1)
        n = np.arange(len(parent)) - np.repeat(np.cumsum(most_M + 1) - most_M - 1, most_M + 1)
        used_M, value_M = used_M[parent] + n * size_bytes, value_M[parent] + total[n]
        counts_MG = np.column_stack([counts_MG[parent], n])
        # Keep what is worth more than everything of no more bytes.
        order = np.lexsort((-value_M, used_M))
        best_before = np.concatenate([[-np.inf], np.maximum.accumulate(value_M[order])[:-1]])
        order = order[value_M[order] > best_before]
        used_M, value_M, counts_MG = used_M[order], value_M[order], counts_MG[order]
    return []


def _placements(resident: Sequence[tuple[int, int]], layers: Sequence[LayerSize]) -> tuple[Placement, ...]:
    slots = [[-1] * layer.num_experts for layer in layers]
    taken = [0] * len(layers)
    for l, e in resident:
        slots[l][e] = taken[l]
        taken[l] += 1
    return tuple(Placement(tuple(slot_E)) for slot_E in slots)


def _check(value_L: Values, layers: Sequence[LayerSize]) -> None:
    got, expected = [len(value_E) for value_E in value_L], [layer.num_experts for layer in layers]
    if got != expected:
        raise ValueError(f"placement: expected one value per expert, {expected} by layer, got {got}")
    if any(not (value_E >= 0).all() for value_E in value_L):
        raise ValueError("placement: expected values of at least 0")
