"""How fast a model will run on a machine under a placement, and what would make it faster. Before loading anything.

Decode is a captured step: every layer reads its dense weights, then residents on the GPU run beside the cold experts,
of which the host and, where kernels can read them there, zero-copy take the best shares. Prefill, and steps of more
sequences than decode's kernels take, is launched by Python: every layer's expected load goes through the exact split,
chunk by chunk. Loads are expectations for tokens that choose experts independently, by `popularity_E`.
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
from monde.planning.placement import place_by_time, place_uniform
from monde.planning.prefetch import certain_fetches
from monde.planning.profile import Curve, ExpertRate, GpuProfile, HardwareProfile, MemoryChannels
from monde.planning.share import best_share
from monde.planning.split import Load, best_split
from monde.planning.staging import Staging

RESOURCES = ("host", "bus", "GPU", "launches")
_SMALL_CHANGE = 1.1
_StepTime = Callable[[HardwareProfile], float]


@dataclass(frozen=True)
class MoeLayer:
    """popularity_E: the probability that a routed pair is of expert e; sums to 1.

    zero_copy: whether decode's kernels can read these experts in host memory. num_ahead: experts that a prompt fetches
    at most before their layer's routing is known. staging: how they travel then; None: one by one, with room for all.
    """

    shape: ExpertShape
    num_topk: int
    popularity_E: NDArray[np.float64]
    zero_copy: bool = True
    num_ahead: int = 0
    staging: Staging | None = None


@dataclass(frozen=True)
class ModelOutline:
    """What a forecast needs to know of a model and of what runs it.

    dense_read_bytes: dense weights that every step reads. kv_passes: how often a step on a GPU goes over the keys and
    values that it holds.
    attention_dim: query heads times the dim of one. decode_tokens: the most that decode's kernels take in a step.
    chunk_tokens: of a prompt at once, every chunk reads its experts anew. is_captured: whether a decode step becomes a
    graph, if it is one of so few tokens.
    """

    layers: tuple[MoeLayer, ...]
    num_blocks: int
    dense_read_bytes: int
    dense_bytes_per_weight: int
    kv_bytes_per_token: int
    kv_passes: float
    attention_dim: int
    decode_tokens: int
    chunk_tokens: int
    is_captured: bool = True


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
    hits = [batch * layer.num_topk * layer.popularity_E for layer in model.layers]
    return place_by_time(
        hits, [CostModel(profile, layer.shape) for layer in model.layers], sizes, budget_bytes
    )


def forecast_decode(
    model: ModelOutline, placements: Sequence[Placement], profile: HardwareProfile, batch: int, context: int
) -> Speed:
    """One token for each of `batch` sequences of `context` tokens."""
    is_few = profile.gpu is not None and batch <= model.decode_tokens
    is_captured = is_few and model.is_captured
    layer_s = decode_layer_s if is_few or profile.gpu is None else prefill_layer_s

    def step_s(machine: HardwareProfile) -> float:
        return (
            dense_decode_s(model, machine, batch, context, is_captured)
            + machine.step_s
            + sum(
                layer_s(layer, placement, machine, batch)
                for layer, placement in zip(model.layers, placements, strict=True)
            )
        )

    return _speed(step_s, profile, batch)


def forecast_prefill(
    model: ModelOutline, placements: Sequence[Placement], profile: HardwareProfile, num_tokens: int
) -> Speed:
    """A prompt of `num_tokens` in one pass."""
    step = num_tokens if profile.gpu is None else model.chunk_tokens
    chunks = [min(step, num_tokens - first) for first in range(0, num_tokens, step)]

    def step_s(machine: HardwareProfile) -> float:
        launch_s, kernels_s = _prompt_block_s(model, machine, num_tokens)
        block_s = max(launch_s, kernels_s)
        whole_s = (model.num_blocks - len(model.layers)) * block_s
        for layer, placement in zip(model.layers, placements, strict=True):
            ends = {
                chunk: _prompt_layer(layer, placement, machine, chunk, block_s / len(chunks))
                for chunk in dict.fromkeys(chunks)
            }
            # Python launches a block while the device still has the products of the layer before.
            last = ends[chunks[-1]]
            whole_s += sum(ends[chunk].device_s for chunk in chunks[:-1])
            whole_s += max(last.python_s + launch_s, last.device_s + kernels_s)
        return whole_s

    return _speed(step_s, profile, num_tokens)


def faster(profile: HardwareProfile, resource: str, factor: float) -> HardwareProfile:
    """The machine with one resource `factor` times as fast; the memory and arithmetic of "host" and "GPU" both."""
    if resource == "host":
        return profile.with_host(lambda rate: _scaled(rate, factor))
    if resource == "launches":
        profile = replace(
            profile,
            host_call_s=profile.host_call_s / factor,
            eager_block_s=profile.eager_block_s / factor,
            step_s=profile.step_s / factor,
        )
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
        gpu = replace(
            gpu,
            block_overhead_s=gpu.block_overhead_s / factor,
            decode_layer_s=gpu.decode_layer_s / factor,
            prompt=gpu.prompt.faster(factor),
            round_trip=trip,
        )
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
    return replace(profile.with_host(lambda rate: rate.with_memory(factor)), memory_channels=more)


def _speed(step_s: _StepTime, profile: HardwareProfile, num_tokens: int) -> Speed:
    now_s = step_s(profile)
    gain = {r: now_s / step_s(faster(profile, r, _SMALL_CHANGE)) for r in RESOURCES}
    return Speed(num_tokens, now_s, gain)


def _scaled(rate: ExpertRate, factor: float) -> ExpertRate:
    curve = Curve(rate.flops_per_s.x, tuple(y * factor for y in rate.flops_per_s.y))
    return ExpertRate(rate.overhead_s, rate.bytes_per_s * factor, curve)


def dense_decode_s(
    model: ModelOutline, machine: HardwareProfile, batch: int, context: int, is_captured: bool
) -> float:
    """Everything but experts of a step: one token for each of `batch` sequences of `context` tokens."""
    # Attention on the host reads keys and values where they lie, once.
    passes = 1.0 if machine.gpu is None else model.kv_passes
    kv_bytes = passes * model.kv_bytes_per_token * batch * context
    kernels_s = _kernels_s(model, machine, batch, model.dense_read_bytes + kv_bytes)
    if machine.gpu is None:
        return model.num_blocks * machine.eager_block_s + kernels_s
    if is_captured:
        return model.num_blocks * machine.gpu.block_overhead_s + kernels_s
    return max(model.num_blocks * machine.eager_block_s, kernels_s)  # Python runs ahead of the GPU


def dense_prefill_s(model: ModelOutline, machine: HardwareProfile, num_tokens: int) -> float:
    """Everything but experts of a prompt, alone."""
    return model.num_blocks * max(_prompt_block_s(model, machine, num_tokens))


def _prompt_block_s(model: ModelOutline, machine: HardwareProfile, num_tokens: int) -> tuple[float, float]:
    """Of a block without its experts: what launching it takes, and its kernels; without a GPU both are its seconds.

    Attention keeps its scores in caches and skips what is in the future.
    """
    attention_flops = 2.0 * model.num_blocks * model.attention_dim * num_tokens**2
    kernels_s = _kernels_s(model, machine, num_tokens, model.dense_read_bytes, attention_flops)
    launch_s, kernels_s = machine.eager_block_s, kernels_s / model.num_blocks
    return (launch_s, kernels_s) if machine.gpu is not None else (launch_s + kernels_s,) * 2


def _kernels_s(
    model: ModelOutline,
    machine: HardwareProfile,
    num_tokens: int,
    read_bytes: float,
    attention_flops: float = 0.0,
) -> float:
    """Of all blocks without their experts."""
    rate = machine.host_expert if machine.gpu is None else machine.gpu.expert
    flops = 2 * model.dense_read_bytes / model.dense_bytes_per_weight * num_tokens + attention_flops
    return max(read_bytes / rate.bytes_per_s, flops / float(rate.flops_per_s.at(num_tokens)))


def decode_layer_s(layer: MoeLayer, placement: Placement, machine: HardwareProfile, batch: int) -> float:
    """The experts of one layer in a step that decode's kernels take."""
    cost = CostModel(machine, layer.shape)
    # A sequence takes an expert with probability min(K p, 1): an expert is idle if no sequence takes it.
    taken_E = np.minimum(layer.num_topk * layer.popularity_E, 1.0)
    active_E = 1 - (1 - taken_E) ** batch
    tokens_E = np.divide(batch * taken_E, active_E, out=np.zeros_like(active_E), where=active_E > 0)
    if machine.gpu is None:
        return machine.host_call_s + float(active_E @ cost.host_s(tokens_E))
    resident_E = placement.slot_E >= 0
    cold_E = np.where(resident_E, 0.0, active_E)
    gpu_s = machine.gpu.decode_layer_s + float((active_E - cold_E) @ cost.resident_s(tokens_E))
    any_cold = 1 - float(np.prod(1 - cold_E))
    if any_cold == 0:
        return gpu_s
    # The seconds of a layer that has cold experts, and how often it has some.
    host_s = float(cold_E @ cost.host_s(tokens_E)) / any_cold
    zero_copy_s = float(cold_E @ cost.zero_copy_s(tokens_E)) / any_cold
    trip_s = float(machine.gpu.round_trip.seconds(batch * layer.shape.act_bytes_per_token))
    if layer.zero_copy:
        share = best_share(zero_copy_s, host_s, machine.gpu.host_while_copying, gpu_s, trip_s)
        cold_s = share.step_s
    else:
        cold_s = max(gpu_s, trip_s + host_s)
    return any_cold * cold_s + (1 - any_cold) * gpu_s


def prefill_layer_s(
    layer: MoeLayer, placement: Placement, machine: HardwareProfile, num_tokens: int, between_s: float = 0.0
) -> float:
    """The experts of one layer in a chunk of a prompt, which comes `between_s` after those of the layer before.

    Until its routing is known the bus brings experts that it will fetch in any case.
    """
    ends = _prompt_layer(layer, placement, machine, num_tokens, between_s)
    return max(ends.python_s, ends.device_s)


@dataclass(frozen=True)
class _Ends:
    """Of a layer's experts: when Python goes on to what follows, and when the device has their sum."""

    python_s: float
    device_s: float


def _prompt_layer(
    layer: MoeLayer, placement: Placement, machine: HardwareProfile, num_tokens: int, between_s: float
) -> _Ends:
    cost = CostModel(machine, layer.shape)
    tokens_E = np.rint(num_tokens * np.minimum(layer.num_topk * layer.popularity_E, 1.0)).astype(np.int64)
    if machine.gpu is None:
        host_s = machine.host_call_s + float(cost.host_s(tokens_E).sum())
        return _Ends(0.0, host_s)
    resident_E = placement.slot_E >= 0
    prompt = machine.gpu.prompt
    if resident_E.all() and layer.shape.reads_panels:  # nothing is planned, and Python waits for nothing
        return _Ends(prompt.resident_s, float(cost.resident_s(tokens_E).sum()))
    ahead = certain_fetches(tokens_E.astype(np.float64), resident_E, num_tokens, cost, layer.num_ahead)
    resident_E[ahead] = True
    busy_s = max(0.0, len(ahead) * float(cost.copy_s()) - prompt.plan_s - between_s)
    load = Load(tokens_E, resident_E, num_tokens, cut_granule=64, bus_busy_s=busy_s)
    split = best_split(load, cost)
    return _Ends(prompt.plan_s + split.python_s, prompt.plan_s + split.makespan_s)
