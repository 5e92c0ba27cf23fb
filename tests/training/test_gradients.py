"""Gradients in slices beside the backward are those of one all-reduce, on every rank; the schedule finds itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from monde.planning.pipeline import Degrees
from monde.planning.training_profile import refitted
from monde.training import auto as auto_module
from monde.training.auto import CONFIRM_ROUNDS, TRIAL_ROUNDS, AutoSchedule, agreed
from monde.training.convert import convert, converted_experts
from monde.training.fabric import Fabric
from monde.training.gradients import GradientReducer, clip_gradients
from tests.distributed.ranks import run_ranks
from tests.monde import tiny
from tests.training.reference import packed, unpacked
from tests.training.test_convert import loss_of


def build(mesh_shape: tuple[int, ...]) -> tuple[Any, Fabric, Tensor]:
    fabric = Fabric(init_device_mesh("cpu", mesh_shape, mesh_dim_names=("node", "local")[: len(mesh_shape)]))
    model = convert(tiny.build("qwen3_moe").train(), fabric, schedule=Degrees(2, 2))
    rank = dist.get_rank()
    return model, fabric, tiny.prompt(batch=4, length=8 + rank)[: 1 + rank]


def shared_grads(model: nn.Module) -> dict[str, Tensor]:
    return {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and ".weights." not in n
    }


def sliced(mesh_shape: tuple[int, ...]) -> bytes:
    """Gradients by plain all-reduce, by reducer without plan and with two; how much was beside the backward."""
    model, fabric, ids = build(mesh_shape)
    loss_of(model, ids).backward()
    plain = shared_grads(model)
    for grad in plain.values():
        dist.all_reduce(grad)
    reducer = GradientReducer(model, fabric)
    answers, early = [plain], []
    for beside, after in (([], []), ([1000, 1000], [0, 0]), ([77, 10**9], [1234, 10**9])):
        reducer.plan_slices(beside, after)
        for _ in range(2):  # twice: nothing is left of the first
            reducer.begin()
            loss_of(model, ids).backward()
            early.append(sum(bucket.num_issued for bucket in reducer.buckets))
            reducer.finish()
        answers.append(shared_grads(model))
    return packed((answers, early, reducer.num_elements))


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 2)], ids=str)
def test_slices_are_one_all_reduce(mesh_shape: tuple[int, ...], tmp_path: Path) -> None:
    size = torch.Size(mesh_shape).numel()
    by_rank = [unpacked(sent) for sent in run_ranks(sliced, size, tmp_path, mesh_shape, deadline_s=90)]
    (plain, *others), early, num_elements = by_rank[0]
    assert early[:2] == [0, 0]
    assert 1000 <= early[2] == early[3] <= 2000
    assert early[2] < early[4] < num_elements  # the first layer's own gradients and the embedding come last
    for grads in others:
        for name, grad in plain.items():
            if size == 2:  # a sum of two has one order
                assert torch.equal(grads[name], grad), name
            else:  # Gloo's order of four depends on where in the buffer an element lies
                bound = 4 * torch.finfo(grad.dtype).eps * float(grad.abs().max())
                torch.testing.assert_close(grads[name], grad, rtol=0, atol=size * bound)
    for answers, _, _ in by_rank[1:]:
        for mine, first in zip(answers, by_rank[0][0], strict=True):
            assert all(torch.equal(mine[name], first[name]) for name in first), "ranks differ"


def clipped(mesh_shape: tuple[int, ...]) -> tuple[float, float]:
    model, fabric, _ = build(mesh_shape)
    reducer = GradientReducer(model, fabric)
    reducer.begin()
    loss_of(model, tiny.prompt(batch=4)[dist.get_rank() :: dist.get_world_size()]).backward()
    reducer.finish()
    norm = clip_gradients(model, fabric, 0.5)
    return norm, clip_gradients(model, fabric, 1e9)


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 2)], ids=str)
def test_the_norm_is_that_of_the_whole_model(mesh_shape: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny.build("qwen3_moe").train()
    loss_of(model, tiny.prompt(batch=4)).backward()
    want = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    for norm, after in run_ranks(
        clipped, torch.Size(mesh_shape).numel(), tmp_path, mesh_shape, deadline_s=90
    ):
        assert norm == pytest.approx(want, rel=1e-5)
        assert after == pytest.approx(0.5, rel=1e-5)


def scheduled_step(
    model: Any, fabric: Fabric, reducer: GradientReducer, schedule: AutoSchedule, ids: Any, step: int
) -> float:
    """The norm of its gradients."""
    schedule.before_step(step)
    reducer.begin()
    loss_of(model, ids).backward()
    reducer.finish()
    schedule.after_step()
    return clip_gradients(model, fabric, 1e9)


def auto(mesh_shape: tuple[int, ...]) -> Any:
    """Profiles and plans of a few steps; then a look at costs that are said to have drifted."""
    model, fabric, _ = build(mesh_shape)
    ids = tiny.prompt(batch=8, length=32)
    lines: list[str] = []
    reducer = GradientReducer(model, fabric)
    schedule = AutoSchedule(fabric, reducer, lines.append)
    # The first is profiled, then at most seven degrees are tried, then the best of them and none.
    num_steps = 1 + 7 * TRIAL_ROUNDS + 2 * CONFIRM_ROUNDS
    norms = [scheduled_step(model, fabric, reducer, schedule, ids, step) for step in range(num_steps)]
    assert schedule.gradient_plan is not None
    (planner,) = schedule.planners.values()
    profile, plan = planner.profile, schedule.gradient_plan
    fabric.observations = []
    loss_of(model, ids).backward()
    seen = agreed(fabric.observations, fabric)
    fabric.observations = None
    degrees = [converted_experts(model)[0].schedule(rows) for rows in (16, 4096)]  # type: ignore[operator]
    return (
        repr((profile, plan, degrees, seen)),
        lines,
        norms,
        [o.seconds_s.keys() == _stages(fabric) for o in seen],
    )


def looked_again(planted: float) -> Any:
    """Settled, then told that experts and link take a `planted` part of what they do: what two looks make of it."""
    auto_module.LOOK_EVERY = 10**6
    model, fabric, _ = build((2,))
    ids, lines = tiny.prompt(batch=8, length=32), []
    reducer = GradientReducer(model, fabric)
    schedule = AutoSchedule(fabric, reducer, lines.append)
    norms = []

    def run(first: int, num_steps: int) -> None:
        steps = range(first, first + num_steps)
        norms.extend(scheduled_step(model, fabric, reducer, schedule, ids, step) for step in steps)

    most = 1 + 7 * TRIAL_ROUNDS + 2 * CONFIRM_ROUNDS
    run(0, most)
    (planner,) = schedule.planners.values()
    wrong = refitted(planner.profile, dict.fromkeys(("forward", "backward", "inter"), planted))
    planner.profile, planner.num_refits = wrong, 0
    lines.clear()
    auto_module.LOOK_EVERY = 2
    run(most + most % 2, 5)  # looks at the 1st, 3rd and 5th; two hold the eight observations that are wanted
    found = planner.profile
    run(most + most % 2 + 5, most)
    return repr((found, planner)), found, wrong, lines, norms


def test_costs_that_drifted_are_fitted_again_while_training(tmp_path: Path) -> None:
    # So small a part that no noise of the profile, of which a link's has been off thirtyfold, hides it.
    answers = run_ranks(looked_again, 2, tmp_path, 1 / 2**20, deadline_s=120)
    agreed_on, found, wrong, lines, norms = answers[0]
    assert answers[1][0] == agreed_on, "ranks would plan differently"
    assert lines[0] == "costs drifted, fitted again (1)"
    assert any(line.startswith("chunks forward/backward") for line in lines[1:]), "nothing was planned anew"
    for cost in ("forward", "backward", "inter"):
        assert getattr(found, cost).seconds(4096) > 8 * getattr(wrong, cost).seconds(4096), cost
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


def _stages(fabric: Fabric) -> set[str]:
    between = {"dispatch", "combine"} if fabric.inter is not None else set()
    inside = {"gather", "scatter"} if fabric.intra is not None else set()
    return {"experts"} | between | inside


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 2)], ids=str)
def test_ranks_agree_on_what_was_measured(mesh_shape: tuple[int, ...], tmp_path: Path) -> None:
    answers = run_ranks(auto, torch.Size(mesh_shape).numel(), tmp_path, mesh_shape, deadline_s=120)
    first, lines, norms, complete = answers[0]
    assert all(answer[0] == first for answer in answers), "\n".join(answer[0] for answer in answers)
    assert any("chunks forward/backward" in line for line in lines)
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)  # planning changes no gradient
    assert complete == [True] * 4
