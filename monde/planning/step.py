"""One pass of a model as a schedule: dense parts in a row, and between them the tasks of every layer's split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monde.planning.cost import CostModel
from monde.planning.prefill_schedule import PrefillTasks
from monde.planning.schedule import Resource, Schedule, ScheduleBuilder
from monde.planning.split import ExpertSplit, Load
from monde.planning.staging import Staging


@dataclass(frozen=True)
class LayerStep:
    """One layer: dense work on the GPU, then, where it has experts, a load and its split."""

    dense_s: float
    load: Load | None = None
    split: ExpertSplit | None = None


def step_schedule(layers: Sequence[LayerStep], cost: CostModel, staging: Staging | None = None) -> Schedule:
    """Copies start when the router has spoken. staging None: experts travel one by one and wait for no buffer."""
    builder, done = ScheduleBuilder(), list[int]()
    for l, layer in enumerate(layers):
        done = [builder.add(f"dense {l}", Resource.GPU, layer.dense_s, done)]
        if layer.load is not None and layer.split is not None:
            load = layer.load
            num_experts = len(load.tokens_E)
            through = staging or Staging.one_by_one(cost.shape.d_ffn, num_experts)
            slot_E = np.where(load.resident_E, np.arange(num_experts), -1)
            tasks = PrefillTasks(
                builder, load, layer.split, cost, through, slot_E, after=done, layer=f"layer {l} "
            )
            done = [tasks.add()]
    return builder.build()
