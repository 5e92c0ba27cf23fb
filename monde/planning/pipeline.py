"""The schedule of one mixture-of-experts layer in training: its chunks, and what is reduced beside them.

A chunk's stages: dispatch (between nodes), gather (inside), experts, scatter (inside), combine (between). The same
schedule runs (training/overlap.py) and is simulated; how many chunks is settled by trying them all in the simulator.
Source of the pipeline and its names: FSMoE (arXiv 2501.10714); enumeration in place of its solver is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from monde.planning.schedule import Resource, Schedule, ScheduleBuilder
from monde.planning.simulate import Contention, Timeline, simulate

MAX_DEGREE = 16
COMPUTE = Resource.GPU  # the stream that computes, whatever the processor
DISPATCH, GATHER, EXPERTS, SCATTER, COMBINE, GRADIENTS = (
    "dispatch", "gather", "experts", "scatter", "combine", "gradients",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage of a whole layer: a chunk of r takes alpha_s + work_s / r."""

    alpha_s: float
    work_s: float

    def chunk_s(self, degree: int) -> float:
        return self.alpha_s + self.work_s / degree


@dataclass(frozen=True)
class Stages:
    """A layer's stages, one way. A link that the mesh does not have is None: dispatch and combine between nodes,
    gather and scatter inside them.
    """

    experts: Stage
    dispatch: Stage | None = None
    combine: Stage | None = None
    gather: Stage | None = None
    scatter: Stage | None = None


@dataclass(frozen=True)
class Degrees:
    """Chunks forward and backward."""

    forward: int = 1
    backward: int = 1

    def __post_init__(self) -> None:
        if min(self.forward, self.backward) < 1:
            raise ValueError(f"Degrees: expected at least one chunk each way, got {self}")


UNSCHEDULED = Degrees()


def layer_schedule(stages: Stages, degree: int, gradient_s: Sequence[float] = ()) -> Schedule:
    """One way through a layer in `degree` chunks; slices of the gradients' all-reduce follow the last dispatch.

    All dispatches come before any combine: a combine that waits would hold up the chunks that feed it.
    """
    builder = ScheduleBuilder()
    arrived = [
        _add(builder, f"{DISPATCH} {i}", Resource.LINK_INTER, stages.dispatch, degree, [])
        for i in range(degree)
    ]
    gathered = [
        _add(builder, f"{GATHER} {i}", Resource.LINK_INTRA, stages.gather, degree, arrived[i])
        for i in range(degree)
    ]
    for k, seconds_s in enumerate(gradient_s):
        builder.add(f"{GRADIENTS} {k}", Resource.LINK_INTER, seconds_s)
    for i in range(degree):
        done = _add(builder, f"{EXPERTS} {i}", COMPUTE, stages.experts, degree, gathered[i])
        summed = _add(builder, f"{SCATTER} {i}", Resource.LINK_INTRA, stages.scatter, degree, done)
        _add(builder, f"{COMBINE} {i}", Resource.LINK_INTER, stages.combine, degree, summed)
    return builder.build()


def _add(
    builder: ScheduleBuilder, name: str, on: Resource, stage: Stage | None, degree: int, after: list[int]
) -> list[int]:
    """What to wait for afterwards."""
    return after if stage is None else [builder.add(name, on, stage.chunk_s(degree), after)]


def layer_timeline(
    stages: Stages, degree: int, contention: Contention, gradient_s: Sequence[float] = ()
) -> Timeline:
    return simulate(layer_schedule(stages, degree, gradient_s), contention)


def best_degree(
    stages: Stages,
    contention: Contention,
    gradient_s: Sequence[float] = (),
    max_degree: int = MAX_DEGREE,
    slack: float = 0.0,
) -> int:
    """The degree of 1 .. max_degree whose schedule is over first; with `slack`, the smallest that takes at most that
    share longer.
    """
    makespan_s = [
        layer_timeline(stages, r, contention, gradient_s).makespan_s for r in range(1, max_degree + 1)
    ]
    allowed_s = min(makespan_s) * (1 + slack)
    return next(r for r, seconds_s in enumerate(makespan_s, 1) if seconds_s <= allowed_s)


def one_lane(stages: Stages, degree: int) -> Schedule:
    """The same chunks where links inside and between nodes share one communication stream (no inter/intra overlap).

    Chunk i + 1's dispatch and gather go before chunk i's scatter and combine. It is what FSMoE is compared with
    (Tutel with PipeMoE's degree); degree 1 has no overlap at all (DeepSpeed-MoE).
    """
    builder = ScheduleBuilder()
    ready: list[list[int]] = []

    def bring(i: int) -> None:
        after = _add(builder, f"{DISPATCH} {i}", Resource.LINK_INTER, stages.dispatch, degree, [])
        ready.append(_add(builder, f"{GATHER} {i}", Resource.LINK_INTER, stages.gather, degree, after))

    def take_back(i: int) -> None:
        after = _add(builder, f"{SCATTER} {i}", Resource.LINK_INTER, stages.scatter, degree, done[i])
        _add(builder, f"{COMBINE} {i}", Resource.LINK_INTER, stages.combine, degree, after)

    bring(0)
    done: list[list[int]] = []
    for i in range(degree):
        done.append(_add(builder, f"{EXPERTS} {i}", COMPUTE, stages.experts, degree, ready[i]))
        if i + 1 < degree:
            bring(i + 1)
        take_back(i)
    return builder.build()


def backward_of(stages: Stages, experts_factor: float = 2.0) -> Stages:
    """The way back: twice the experts' work (gradients of rows and of weights), the same collectives."""
    experts = Stage(stages.experts.alpha_s * experts_factor, stages.experts.work_s * experts_factor)
    return replace(stages, experts=experts)
