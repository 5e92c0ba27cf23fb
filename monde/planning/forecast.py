"""How fast a model will run on a machine under a placement, and what would make it faster. Before loading anything.

Decode: every layer reads its dense weights, then residents on the GPU run beside the cold experts, of which the host
and zero-copy take the best shares. Prefill: every layer's expected load goes through the exact split. Loads are
expectations for tokens that choose experts independently, by `popularity_E`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from monde.core import Placement
from monde.planning.budget import LayerSize
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.fit import AlphaBeta
from monde.planning.placement import place, place_uniform, time_saved_s
from monde.planning.profile import Curve, ExpertRate, GpuProfile, HardwareProfile, MemoryChannels
from monde.planning.share import best_share
from monde.planning.split import Load, best_split

RESOURCES = ("host", "bus", "GPU", "launches")
_SMALL_CHANGE = 1.1
_StepTime = Callable[[HardwareProfile], float]


@dataclass(frozen=True)
class MoeLayer:
    """popularity_E: the probability that a routed pair is of expert e; sums to 1."""

    shape: ExpertShape
    num_topk: int
    popularity_E: NDArray[np.float64]


@dataclass(frozen=True)
class ModelOutline:
    """What a forecast needs to know of a model. dense_read_bytes: dense weights that every step reads."""

    layers: tuple[MoeLayer, ...]
    num_blocks: int
    dense_read_bytes: int
    dense_bytes_per_weight: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Speed:
    """step_s: one decode step, or one prefill. gain[r]: how many times as fast with 10% more of resource r."""

    num_tokens: int
    step_s: float
    gain: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.step_s

    @property
    def limit(self) -> str:
        """The resource of which more helps most."""
        return max(self.gain, key=lambda resource: self.gain[resource])


def place_for_decode(
    model: ModelOutline, sizes: Sequence[LayerSize], budget_bytes: int, profile: HardwareProfile, batch: int
) -> tuple[Placement, ...]:
    """The placement that saves most in decode steps of `batch` tokens; sizes are those of model.layers."""
    if profile.gpu is None:
        return place_uniform(sizes, 0)
    values = [
        time_saved_s(batch * layer.num_topk * layer.popularity_E, CostModel(profile, layer.shape))
        for layer in model.layers
    ]
    return place(values, sizes, budget_bytes)


def forecast_decode(
    model: ModelOutline, placements: Sequence[Placement], profile: HardwareProfile, batch: int, context: int
) -> Speed:
    """One token for each of `batch` sequences of `context` tokens."""
    kv_bytes = model.kv_bytes_per_token * batch * context

    def step_s(machine: HardwareProfile) -> float:
        return _dense_s(model, machine, batch, kv_bytes) + sum(
            _decode_layer_s(layer, placement, machine, batch)
            for layer, placement in zip(model.layers, placements, strict=True)
        )

    return _speed(step_s, profile, batch)


def forecast_prefill(
    model: ModelOutline, placements: Sequence[Placement], profile: HardwareProfile, num_tokens: int
) -> Speed:
    """A prompt of `num_tokens` in one pass."""

    def step_s(machine: HardwareProfile) -> float:
        return _dense_s(model, machine, num_tokens, 0) + sum(
            _prefill_layer_s(layer, placement, machine, num_tokens)
            for layer, placement in zip(model.layers, placements, strict=True)
        )

    return _speed(step_s, profile, num_tokens)


def faster(profile: HardwareProfile, resource: str, factor: float) -> HardwareProfile:
    """The machine with one resource `factor` times as fast; the memory and arithmetic of "host" and "GPU" both."""
    if resource == "host":
        return replace(profile, host_expert=_scaled(profile.host_expert, factor))
    if profile.gpu is None:
        return profile
    gpu: GpuProfile = profile.gpu
    if resource == "bus":
        h2d = AlphaBeta(gpu.h2d.alpha_s, gpu.h2d.s_per_unit / factor)
        gpu = replace(gpu, h2d=h2d, zero_copy_bytes_per_s=gpu.zero_copy_bytes_per_s * factor)
    elif resource == "GPU":
        gpu = replace(gpu, expert=_scaled(gpu.expert, factor))
    elif resource == "launches":
        trip = AlphaBeta(gpu.round_trip.alpha_s / factor, gpu.round_trip.s_per_unit)
        gpu = replace(gpu, block_overhead_s=gpu.block_overhead_s / factor, round_trip=trip)
    else:
        raise ValueError(f"faster: expected one of {', '.join(RESOURCES)}, got {resource!r}")
    return replace(profile, gpu=gpu)


def with_one_more_channel(profile: HardwareProfile) -> HardwareProfile | None:
    """The machine with its host memory that much faster; the bus stays. None where its channels are not known."""
    channels = profile.memory_channels
    if channels is None:
        return None
    more = MemoryChannels(channels.num_channels + 1, channels.channel_bytes_per_s)
    factor = more.num_channels / channels.num_channels
    return replace(profile, host_expert=profile.host_expert.with_memory(factor), memory_channels=more)


def _speed(step_s: _StepTime, profile: HardwareProfile, num_tokens: int) -> Speed:
    now_s = step_s(profile)
    gain = {r: now_s / step_s(faster(profile, r, _SMALL_CHANGE)) for r in RESOURCES}
    return Speed(num_tokens, now_s, gain)


def _scaled(rate: ExpertRate, factor: float) -> ExpertRate:
    curve = Curve(rate.flops_per_s.x, tuple(y * factor for y in rate.flops_per_s.y))
    return ExpertRate(rate.overhead_s, rate.bytes_per_s * factor, curve)


def _dense_s(model: ModelOutline, machine: HardwareProfile, num_tokens: int, kv_bytes: int) -> float:
    rate = machine.host_expert if machine.gpu is None else machine.gpu.expert
    overhead_s = 0.0 if machine.gpu is None else model.num_blocks * machine.gpu.block_overhead_s
    num_weights = model.dense_read_bytes / model.dense_bytes_per_weight
    compute_s = 2 * num_weights * num_tokens / float(rate.flops_per_s.at(num_tokens))
    return overhead_s + max((model.dense_read_bytes + kv_bytes) / rate.bytes_per_s, compute_s)


def _decode_layer_s(layer: MoeLayer, placement: Placement, machine: HardwareProfile, batch: int) -> float:
    cost = CostModel(machine, layer.shape)
    # A sequence takes an expert with probability min(K p, 1): an expert is idle if no sequence takes it.
    taken_E = np.minimum(layer.num_topk * layer.popularity_E, 1.0)
    active_E = 1 - (1 - taken_E) ** batch
    tokens_E = np.divide(batch * taken_E, active_E, out=np.zeros_like(active_E), where=active_E > 0)
    if machine.gpu is None:
        return float(active_E @ cost.host_s(tokens_E))
    resident_E = np.asarray(placement.slot_of_expert_E) >= 0
    cold_E = np.where(resident_E, 0.0, active_E)
    host_s = float(cold_E @ cost.host_s(tokens_E))
    zero_copy_s = float(cold_E @ cost.zero_copy_s(tokens_E))
    resident_s = float((active_E - cold_E) @ cost.resident_s(tokens_E))
    trip_s = float(cost.round_trip_s(batch)) if host_s > 0 else 0.0
    return best_share(zero_copy_s, host_s, machine.gpu.host_while_copying, resident_s, trip_s).step_s


def _prefill_layer_s(
    layer: MoeLayer, placement: Placement, machine: HardwareProfile, num_tokens: int
) -> float:
    cost = CostModel(machine, layer.shape)
    tokens_E = np.rint(num_tokens * np.minimum(layer.num_topk * layer.popularity_E, 1.0)).astype(np.int64)
    if machine.gpu is None:
        return float(cost.host_s(tokens_E).sum())
    resident_E = np.asarray(placement.slot_of_expert_E) >= 0
    return best_split(Load(tokens_E, resident_E, num_tokens, cut_granule=64), cost).makespan_s
