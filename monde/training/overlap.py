"""A layer's exchange and experts as one differentiable step, in any number of chunks each way.

What runs when is a planning.Schedule: tasks on links go to lanes, the experts run here. Every schedule gives the same
answer up to the rounding of sums; degree 1 is the unscheduled layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from monde.planning.pipeline import (
    COMBINE,
    COMPUTE,
    DISPATCH,
    EXPERTS,
    GATHER,
    GRADIENTS,
    SCATTER,
    Degrees,
    Stage,
    Stages,
    layer_schedule,
)
from monde.planning.schedule import Resource, Schedule
from monde.planning.training_profile import BACKWARD, FORWARD
from monde.training import exchange
from monde.training.experts import ExpertWeights
from monde.training.fabric import Fabric
from monde.training.hooks import ChunkHook, Hooks
from monde.training.lanes import Action, Done, Ticket
from monde.training.traffic import Chunk, Traffic

_UNTIMED = Stage(0.0, 0.0)


def execute(schedule: Schedule, actions: dict[str, Action], fabric: Fabric) -> list[Ticket]:
    """Run the tasks; on return the compute stream is behind all of them but the gradients' slices.

    Returns the tickets of those. An error on a lane is raised here.
    """
    tickets: list[Ticket] = []
    for task in schedule.tasks:
        after = [tickets[before] for before in task.after]
        if task.resource is COMPUTE:
            for ticket in after:
                ticket.wait()
            fabric.compute(task.name, actions[task.name])
            tickets.append(Done())
        else:
            tickets.append(fabric.lanes[task.resource].submit(task.name, actions[task.name], after))
    slices = []
    for task, ticket in zip(schedule.tasks, tickets, strict=True):
        if task.name.startswith(GRADIENTS):
            slices.append(ticket)
        else:
            ticket.wait()
    return slices


def runnable(fabric: Fabric, degree: int, num_slices: int = 0) -> Schedule:
    """The layer's schedule on this mesh, with the stages that it has links for."""
    inter = _UNTIMED if fabric.inter is not None else None
    intra = _UNTIMED if fabric.intra is not None else None
    return layer_schedule(Stages(_UNTIMED, inter, inter, intra, intra), degree, [0.0] * num_slices)


@dataclass
class Slices:
    """Parts of the gradients' all-reduce: to issue beside one layer's backward, and right after it (beside what is
    computed next). started: told their tickets.
    """

    beside: list[Action] = field(default_factory=list)
    after: list[Action] = field(default_factory=list)
    started: Callable[[list[Ticket]], None] = lambda tickets: None


@dataclass(frozen=True)
class Step:
    """One use of a layer. slices: what of the gradients to reduce beside this layer's backward."""

    experts: ExpertWeights
    traffic: Traffic
    degrees: Degrees
    hooks: Hooks
    slices: Callable[[], Slices] = Slices


Compute = Callable[[int, Tensor, list[int]], Tensor]


def _run(rows_RD: Tensor, step: Step, direction: str, compute: Compute, slices: Slices) -> Tensor:
    """Rows through the four exchanges, with `compute` of every chunk's rows (expert by expert) between them."""
    fabric = step.experts.fabric
    degree = step.degrees.forward if direction == FORWARD else step.degrees.backward
    chunks = [step.traffic.chunk(i, degree) for i in range(degree)]
    at: list[Tensor] = [rows_RD] * degree  # what each chunk's rows are by now
    out_RD = torch.empty_like(rows_RD)
    actions: dict[str, Action] = {}
    for i, chunk in enumerate(chunks):

        def dispatch(i: int = i, chunk: Chunk = chunk) -> None:
            at[i] = exchange.dispatch(at[i], chunk, fabric)

        def gather(i: int = i, chunk: Chunk = chunk) -> None:
            at[i] = exchange.gather(at[i], chunk, fabric)

        def experts(i: int = i, chunk: Chunk = chunk) -> None:
            by_expert_RD = at[i].index_select(0, chunk.to_experts_index.to(rows_RD.device))
            done_RD = compute(i, by_expert_RD, chunk.expert_counts)
            at[i] = done_RD.index_select(0, chunk.from_experts_index.to(rows_RD.device))

        def scatter(i: int = i, chunk: Chunk = chunk) -> None:
            at[i] = exchange.scatter(at[i], chunk, fabric)

        def combine(i: int = i, chunk: Chunk = chunk) -> None:
            exchange.combine(at[i], chunk, fabric, out_RD)

        names = (DISPATCH, GATHER, EXPERTS, SCATTER, COMBINE)
        for name, action in zip(names, (dispatch, gather, experts, scatter, combine), strict=True):
            actions[f"{name} {i}"] = action
        if fabric.inter is None:  # no link between nodes: dispatch and combine only pick rows
            dispatch()
    actions |= {f"{GRADIENTS} {k}": action for k, action in enumerate(slices.beside)}
    schedule = runnable(fabric, degree, len(slices.beside))
    with fabric.observed(direction, degree, step.traffic.busiest_rows):
        slices.started(execute(schedule, actions, fabric))
    slices.started([fabric.lanes[Resource.LINK_INTER].submit(GRADIENTS, action) for action in slices.after])
    if fabric.inter is None:
        for i, chunk in enumerate(chunks):
            exchange.combine(at[i], chunk, fabric, out_RD)
    return out_RD


class _Overlapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, step: Step, *weights: Tensor) -> Tensor:
        w = dict(zip(step.experts.weights(), weights, strict=True))
        saved: list[list[Tensor]] = []
        hooks = [ChunkHook(step.hooks.after_dispatch), ChunkHook(step.hooks.before_combine)]

        def compute(i: int, x_RD: Tensor, counts_E: list[int]) -> Tensor:
            y_RD, kept = step.experts(hooks[0].forward(x_RD), counts_E, w)
            saved.append(kept)
            return hooks[1].forward(y_RD)

        out_RD = _run(rows_RD, step, FORWARD, compute, Slices())
        ctx.step, ctx.hooks, ctx.num_weights = step, hooks, len(weights)
        ctx.save_for_backward(*weights, *(tensor for kept in saved for tensor in kept))
        return out_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        step: Step = ctx.step
        tensors = ctx.saved_tensors  # once: activation checkpointing lets them be asked for once
        weights, kept = tensors[: ctx.num_weights], tensors[ctx.num_weights :]
        names = list(step.experts.weights())
        w = dict(zip(names, weights, strict=True))
        wanted = zip(names, weights, ctx.needs_input_grad[2:], strict=True)
        grads = {name: torch.zeros_like(weight) for name, weight, needs in wanted if needs}
        saved = _regrouped(kept, step)

        def compute(i: int, grad_RD: Tensor, counts_E: list[int]) -> Tensor:
            grad_RD = ctx.hooks[1].backward(i, grad_RD)
            grad_x_RD = step.experts.backward(grad_RD, saved[i], counts_E, w, grads)
            out_RD: Tensor = ctx.hooks[0].backward(i, grad_x_RD)
            return out_RD

        grad_rows_RD = _run(grad_RD.contiguous(), step, BACKWARD, compute, step.slices())
        return grad_rows_RD, None, *(grads.get(name) for name in names)


def _regrouped(kept: Sequence[Tensor], step: Step) -> list[list[Tensor]]:
    """What the forward chunks kept, by backward chunk."""
    before, after = step.degrees.forward, step.degrees.backward
    each = len(kept) // before
    by_chunk = [list(kept[i * each : (i + 1) * each]) for i in range(before)]
    if before == after:
        return by_chunk
    whole = [torch.cat([chunk[k] for chunk in by_chunk]) for k in range(each)]
    device = whole[0].device
    return [
        [tensor.index_select(0, index.to(device)) for tensor in whole]
        for index in step.traffic.regroup(before, after)
    ]


def overlapped(rows_RD: Tensor, step: Step) -> Tensor:
    """y_RD: every row's expert's output, at the row's place."""
    y_RD: Tensor = _Overlapped.apply(rows_RD, step, *step.experts.weights().values())  # type: ignore[no-untyped-call]
    return y_RD
