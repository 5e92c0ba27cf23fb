"""Which part of the gradients' all-reduce runs beside which layer's backward: exact on a grid, by dynamic programming.

Two places a layer: beside its exchange (before the first combine, where the link between nodes would wait for experts)
and beside its dense part (attention's backward, where the link has nothing to do). What fits nowhere is reduced at the
end, alone. The idea is FSMoE's adaptive gradient partitioning (arXiv 2501.10714); its two steps, fill the windows and
spread the rest, are one search here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from monde.planning.fit import AlphaBeta
from monde.planning.pipeline import COMPUTE, GRADIENTS, Stages, layer_schedule
from monde.planning.schedule import Resource, Schedule, Task
from monde.planning.simulate import Contention, simulate

NUM_UNITS = 24  # the grid: gradients are dealt out in that many equal parts


@dataclass(frozen=True)
class BackwardLayer:
    """dense_s: compute after the experts' backward, until the next layer's begins. ready_elements: of the gradients
    that are final when the experts' backward begins, counted from the first that was made.
    """

    stages: Stages
    degree: int
    dense_s: float
    ready_elements: int


@dataclass(frozen=True)
class GradientPlan:
    """Elements by layer, in order of forward; end_elements are reduced alone, last. predicted_s: the whole backward."""

    beside: tuple[int, ...]
    after: tuple[int, ...]
    end_elements: int
    predicted_s: float


def backward_layer_schedule(layer: BackwardLayer, beside_s: float, after_s: float) -> Schedule:
    """One layer's backward and its dense part, with a slice of the all-reduce in each place; 0: none."""
    moe = layer_schedule(layer.stages, layer.degree, [beside_s] if beside_s else [])
    last = tuple(i for i, task in enumerate(moe.tasks) if not task.name.startswith(GRADIENTS))
    tasks = [*moe.tasks, Task("dense", COMPUTE, layer.dense_s, last)]
    if after_s:
        tasks.append(Task(f"{GRADIENTS} after", Resource.LINK_INTER, after_s, last))
    return Schedule(tuple(tasks))


def plan_gradients(
    layers: Sequence[BackwardLayer],
    all_reduce: AlphaBeta,
    num_elements: int,
    contention: Contention,
    num_units: int = NUM_UNITS,
) -> GradientPlan:
    """The least sum of the layers' backward times and of the all-reduce left for the end.

    Slices are whole units of the grid; a layer reduces no gradient before it is final. A layer ends when its dense
    part and its slices have. all_reduce: seconds over elements.
    """
    unit = -(-num_elements // num_units) if num_elements else 1
    num_units = -(-num_elements // unit)

    def elements(units: int) -> int:
        return min(units * unit, num_elements)

    def seconds(units: int) -> float:
        return float(all_reduce.seconds(float(units * unit)))

    known: dict[tuple[BackwardLayer, int], tuple[float, int]] = {}

    def layer_s(layer: BackwardLayer, units: int) -> tuple[float, int]:
        """Of the best way to divide `units` between the two places, and how many are beside the exchange."""
        key = (layer, units)
        if key not in known:
            known[key] = min(
                (
                    simulate(
                        backward_layer_schedule(layer, seconds(b), seconds(units - b)), contention
                    ).makespan_s,
                    b,
                )
                for b in range(units + 1)
            )
        return known[key]

    # best[u]: seconds so far with u units reduced, and how many each layer took.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer in reversed(layers):
        ready = layer.ready_elements // unit if layer.ready_elements < num_elements else num_units
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for done, (so_far_s, taken) in best.items():
            for units in range(max(0, ready - done) + 1):
                total_s = so_far_s + layer_s(layer, units)[0]
                if done + units not in after or total_s < after[done + units][0]:
                    after[done + units] = (total_s, (*taken, units))
        best = after
    rest = {done: so_far_s + seconds(num_units - done) for done, (so_far_s, _) in best.items()}
    done = min(rest, key=lambda u: (rest[u], u))
    taken = best[done][1][::-1]
    beside = tuple(layer_s(layer, units)[1] for layer, units in zip(layers, taken, strict=True))
    return GradientPlan(
        beside=tuple(elements(b) for b in beside),
        after=tuple(elements(units) - elements(b) for b, units in zip(beside, taken, strict=True)),
        end_elements=num_elements - min(num_elements, done * unit),
        predicted_s=rest[done],
    )
