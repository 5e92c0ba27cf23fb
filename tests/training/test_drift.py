"""No drift in a long run: one process that starts from the ranks' state goes on as they do, all along the run.

Rounding grows in training, so that runs compared from their common start say nothing after some fifty steps, and a
fault of a thousandth a step could hide there. From equal states over a few steps it cannot.
"""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monde.training import checkpoint
from monde.training.convert import converted_experts
from monde.training.job import LOSSES, StepRecord, TrainingJob, read_losses
from tests.distributed.ranks import run_ranks
from tests.monde import tiny
from tests.training.test_job import job_for

NUM_STEPS, NUM_APART = 64, 4
MAX_GRAD_NORM = 2.2  # about the median here: some steps are clipped, some are not
# fp32: losses and norms are sums in another order, 2e-7 apart where measured. Moments and weights by their norm, as a
# part of how far they moved: 1e-6 and 3e-5, because Adam divides by gradients that may be small. Each times ten.
SUMS_REL, MOMENTS_REL, WEIGHTS_REL = 2e-6, 1e-5, 3e-4


def uneven_batch(step: int) -> Tensor:
    """Five sequences, two for one rank and three for the other, some of few kinds of tokens: experts go without."""
    generator = torch.Generator().manual_seed(step)
    num_kinds = int(torch.randint(1, tiny.VOCABULARY - 3, (), generator=generator))
    return torch.randint(3, 3 + num_kinds, (5, 9), generator=generator)


def job(folder: Path, mesh_shape: tuple[int, ...] | None) -> TrainingJob:
    return job_for(
        folder, mesh_shape, uneven_batch, checkpoint_every=NUM_APART, keep=NUM_STEPS, steps=NUM_STEPS,
        max_grad_norm=MAX_GRAD_NORM, aux_weight=0.1,
    )  # fmt: skip


def fewest_rows_of_an_expert(folder: Path, mesh_shape: tuple[int, ...]) -> int:
    """Trains."""
    running = job(folder, mesh_shape)
    fewest = []
    for _ in running.run():
        loads = [layer.load for layer in converted_experts(running.model)]
        fewest.append(min(int(load.assigned_E.min()) for load in loads if load is not None))
    return min(fewest)


def state_at(path: Path, scratch: TrainingJob) -> dict[str, Tensor]:
    checkpoint.load(path, scratch.model, scratch.optimizer, scratch.fabric)
    state = checkpoint.state_of(scratch.model, scratch.optimizer)
    return {name: tensor.clone() for name, tensor in state.items()}


def a_few_steps_from(path: Path, folder: Path) -> tuple[list[StepRecord], Path]:
    """One process; its losses and its checkpoint after NUM_APART steps."""
    shutil.copytree(path, folder / path.name)
    alone = job(folder, None)
    until = alone.resume() + NUM_APART
    for record in alone.run():
        if record.step + 1 == until:
            break
    return read_losses(folder / LOSSES), checkpoint.complete(folder)[-1]


@pytest.mark.parametrize("mesh_shape", [(2,), (1, 2)], ids=str)
def test_one_process_goes_on_as_ranks_do_from_every_state(
    mesh_shape: tuple[int, ...], tmp_path: Path
) -> None:
    many = tmp_path / "many"
    assert run_ranks(fewest_rows_of_an_expert, 2, tmp_path, many, mesh_shape, deadline_s=300)[0] == 0
    records, paths = read_losses(many / LOSSES), checkpoint.complete(many)
    assert (len(records), len(paths)) == (NUM_STEPS, NUM_STEPS // NUM_APART)
    assert min(r.gradient_norm for r in records) < MAX_GRAD_NORM < max(r.gradient_norm for r in records)
    scratch = job(tmp_path / "scratch", None)
    for begin, (before, after) in enumerate(pairwise(paths), 1):
        alone, reached = a_few_steps_from(before, tmp_path / before.name)
        theirs = records[begin * NUM_APART : (begin + 1) * NUM_APART]
        for what in ("loss", "balance", "gradient_norm"):
            expected = pytest.approx([getattr(r, what) for r in theirs], rel=SUMS_REL)
            assert [getattr(r, what) for r in alone] == expected, (before.name, what)
        start, one, two = (state_at(path, scratch) for path in (before, reached, after))
        for name, tensor in two.items():
            moved = float((tensor - start[name]).double().norm())
            apart = float((tensor - one[name]).double().norm())
            allowed = WEIGHTS_REL if name.startswith("model.") else MOMENTS_REL
            assert apart <= allowed * moved, f"{before.name}, {name}: moved {moved:.3g}, {apart:.3g} apart"
