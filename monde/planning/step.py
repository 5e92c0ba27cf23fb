"""One pass of a model as a schedule: dense parts in a row, and between them the lanes of every layer's split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monde.planning.cost import CostModel
from monde.planning.schedule import Resource, Schedule, ScheduleBuilder
from monde.planning.split import ExpertSplit, Load, Where


@dataclass(frozen=True)
class LayerStep:
    """One layer: dense work on the GPU, then, where it has experts, a load and its split."""

    dense_s: float
    load: Load | None = None
    split: ExpertSplit | None = None


def step_schedule(layers: Sequence[LayerStep], cost: CostModel) -> Schedule:
    """Copies start when the router has spoken; the fetched with most tokens first, the cut expert last.

    The host's share of a layer is one task, its round trip included: it starts with the copies.
    """
    builder, done = ScheduleBuilder(), list[int]()
    for l, layer in enumerate(layers):
        dense = builder.add(f"dense {l}", Resource.GPU, layer.dense_s, done)
        done = [dense]
        if layer.load is not None and layer.split is not None:
            done = add_experts(builder, l, layer.load, layer.split, cost, dense)
    return builder.build()


def add_experts(
    builder: ScheduleBuilder, l: int, load: Load, split: ExpertSplit, cost: CostModel, dense: int
) -> list[int]:
    """Adds one layer's experts; returns what the next layer waits for."""
    done, launched = [dense], [dense]
    if split.launch_s > 0:
        launched = [builder.add(f"launch {l}", Resource.LAUNCHES, split.launch_s, [dense])]
        done += launched
    if split.host_s > 0:
        done.append(builder.add(f"host {l}", Resource.HOST, split.host_s, [dense]))
    tokens_resident = load.tokens_E[split.where_E == Where.RESIDENT]
    if len(tokens_resident):
        resident_s = float(cost.resident_s(tokens_resident).sum())
        done.append(builder.add(f"residents {l}", Resource.GPU, resident_s, launched))
    fetched = np.flatnonzero(split.where_E == Where.FETCHED)
    fetches = [(int(e), 1.0) for e in fetched[np.argsort(-load.tokens_E[fetched], kind="stable")]]
    if split.cut_expert is not None:
        fetches.append((split.cut_expert, split.cut_rows / cost.shape.d_ffn))
    for expert, share in fetches:
        name = f"expert {l}.{expert}"
        copied = builder.add(f"copy {name}", Resource.PCIE_UP, float(cost.copy_s(share)), [dense])
        gemm_s = float(cost.resident_s(load.tokens_E[expert], share))
        done.append(builder.add(name, Resource.GPU, gemm_s, [*launched, copied]))
    return done
