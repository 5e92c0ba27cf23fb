"""Recorded routing on any machine: every step of a trace as a schedule of tasks, simulated with contention.

Letters: L layers, T tokens of the step, K experts per token, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monde.core import Placement
from monde.planning.cost import CostModel
from monde.planning.forecast import ModelOutline, MoeLayer, dense_decode_s, dense_prefill_s
from monde.planning.prefill_schedule import PrefillTasks
from monde.planning.profile import HardwareProfile
from monde.planning.schedule import Resource, Schedule, ScheduleBuilder
from monde.planning.share import best_share
from monde.planning.simulate import contention_of, simulate
from monde.planning.split import Load, best_split
from monde.planning.staging import Staging

RoutedStep = Sequence[NDArray[np.integer]]  # by layer (T, K) expert ids, below 0 where a pair does not count


@dataclass(frozen=True)
class Played:
    """Seconds of every step, and how long each resource was busy in all of them."""

    step_s: tuple[float, ...]
    busy_s: dict[Resource, float]


def play(
    steps: Iterable[RoutedStep],
    model: ModelOutline,
    placements: Sequence[Placement],
    profile: HardwareProfile,
    context: int,
) -> Played:
    """Steps of a model under a placement; decode steps have `context` tokens in the cache.

    Errors: ValueError for steps that do not have one array a layer, or ids that a layer does not have.
    """
    seconds, busy = list[float](), dict[Resource, float]()
    contention = contention_of(profile)
    for step in steps:
        timeline = simulate(schedule_of(step, model, placements, profile, context), contention)
        seconds.append(timeline.makespan_s)
        for resource in {span.resource for span in timeline.spans}:
            busy[resource] = busy.get(resource, 0.0) + timeline.busy_s(resource)
    return Played(tuple(seconds), busy)


def schedule_of(
    step: RoutedStep,
    model: ModelOutline,
    placements: Sequence[Placement],
    profile: HardwareProfile,
    context: int,
) -> Schedule:
    """What the runtime does with one step, decode or prompt by its number of tokens. Errors: as play."""
    if len(step) != len(model.layers):
        raise ValueError(
            f"trace: expected {len(model.layers)} layers a step, got {len(step)}; give the trace of this model"
        )
    num_tokens = max((len(ids_TK) for ids_TK in step), default=0)
    is_decode = num_tokens <= (1 if profile.gpu is None else model.decode_tokens)
    dense_s = (
        dense_decode_s(model, profile, num_tokens, context, profile.gpu is not None) + profile.step_s
        if is_decode
        else dense_prefill_s(model, profile, num_tokens)
    )
    dense_on = Resource.HOST if profile.gpu is None else Resource.GPU
    builder, done = ScheduleBuilder(), list[int]()
    for l, (ids_TK, layer, placement) in enumerate(zip(step, model.layers, placements, strict=True)):
        dense = builder.add(f"dense {l}", dense_on, dense_s / len(model.layers), done)
        num_experts = len(layer.popularity_E)
        if ids_TK.size and int(ids_TK.max()) >= num_experts:
            raise ValueError(
                f"trace: layer {l} has {num_experts} experts, got {int(ids_TK.max())}; give the trace of this model"
            )
        if ids_TK.size and ids_TK.shape[1] != layer.num_topk:
            raise ValueError(
                f"trace: a token takes {layer.num_topk} experts, got {ids_TK.shape[1]}; give the trace of this model"
            )
        tokens_E = np.bincount(ids_TK[ids_TK >= 0], minlength=num_experts)
        cost = CostModel(profile, layer.shape)
        if profile.gpu is None:
            host_s = profile.host_call_s + float(cost.host_s(tokens_E).sum())
            done = [builder.add(f"host {l}", Resource.HOST, host_s, [dense])]
            continue
        resident_E = placement.slot_E >= 0
        if is_decode:
            done = _decode_layer(builder, l, layer, tokens_E, resident_E, num_tokens, cost, dense)
        elif resident_E.all() and layer.shape.reads_panels:
            launched = builder.add(f"launches {l}", Resource.LAUNCHES, cost.gpu.prompt.resident_s, [dense])
            gemm_s = float(cost.resident_s(tokens_E).sum())
            done = [launched, builder.add(f"residents {l}", Resource.GPU, gemm_s, [dense])]
        else:
            load = Load(tokens_E, resident_E, num_tokens, cut_granule=64)
            slot_E = placement.slot_E
            staging = layer.staging or Staging.one_by_one(layer.shape.d_ffn, num_experts)
            split = best_split(load, cost)
            own = builder.add(f"layer {l}", Resource.GPU, cost.gpu.prompt.plan_s, [dense])
            tasks = PrefillTasks(
                builder, load, split, cost, staging, slot_E, after=[own], layer=f"layer {l} "
            )
            done = [tasks.add()]
    return builder.build()


def _decode_layer(
    builder: ScheduleBuilder,
    l: int,
    layer: MoeLayer,
    tokens_E: NDArray[np.int64],
    resident_E: NDArray[np.bool_],
    num_tokens: int,
    cost: CostModel,
    dense: int,
) -> list[int]:
    """Residents, then the bus' part of the cold experts; beside both the host's part and its round trip."""
    gpu = cost.gpu
    cold_E = np.where(resident_E, 0, tokens_E)
    gpu_s = gpu.decode_layer_s + float(cost.resident_s(tokens_E - cold_E).sum())
    done = [builder.add(f"residents {l}", Resource.GPU, gpu_s, [dense])]
    if not cold_E.any():
        return done
    host_s, bus_s = float(cost.host_s(cold_E).sum()), float(cost.zero_copy_s(cold_E).sum())
    trip_s = float(gpu.round_trip.seconds(num_tokens * layer.shape.act_bytes_per_token))
    share = best_share(bus_s, host_s, gpu.host_while_copying, gpu_s, trip_s).share if layer.zero_copy else 0.0
    if share > 0:
        done = [builder.add(f"zero-copy {l}", Resource.PCIE_UP, share * bus_s, done)]
    if share < 1:
        done.append(builder.add(f"host {l}", Resource.HOST, trip_s + (1 - share) * host_s, [dense]))
    return done
