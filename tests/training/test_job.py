"""Training runs: equal losses on any mesh, checkpoints that any mesh reads, and what happens when ranks go."""

from __future__ import annotations

import os
import resource
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from monde.planning.pipeline import Degrees
from monde.training import checkpoint
from monde.training.config import (
    ModelSettings,
    OptimizerSettings,
    OutputSettings,
    ParallelSettings,
    TrainConfig,
)
from monde.training.convert import convert
from monde.training.fabric import Fabric
from monde.training.job import LOSSES, StepRecord, TrainingJob, read_losses
from tests.distributed.ranks import run_ranks
from tests.monde import tiny
from tests.training.reference import packed, unpacked

STEPS = 6


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, tiny.VOCABULARY, (4, 9), generator=generator)


def fabric_for(mesh_shape: tuple[int, ...] | None, timeout_s: float = 60.0) -> Fabric:
    if mesh_shape is None:
        return Fabric(None)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("node", "local")[: len(mesh_shape)])
    return Fabric(mesh, timeout=timedelta(seconds=timeout_s))


def job_for(
    folder: Path, mesh_shape: tuple[int, ...] | None, batch_of: Any = batch, name: str = "olmoe",
    timeout_s: float = 60.0, chunks: Any = (2, 3), checkpoint_every: int = 2, keep: int = 2, digest: str = "",
    **optimizer: Any,
) -> TrainingJob:  # fmt: skip
    config = TrainConfig(
        ModelSettings("tiny"),
        OutputSettings(str(folder), checkpoint_every=checkpoint_every, keep=keep),
        optimizer=OptimizerSettings(**{"steps": STEPS, "batch": 4, "warmup_steps": 2} | optimizer),
        parallel=ParallelSettings(chunks=chunks, timeout_s=timeout_s),
    )
    fabric = fabric_for(mesh_shape, timeout_s)
    model = convert(tiny.build(name), fabric, schedule=Degrees(2, 3))
    return TrainingJob(model, fabric, config, batch_of, folder, data_digest=digest)


def train(folder: Path, mesh_shape: tuple[int, ...] | None, num_steps: int = STEPS) -> list[StepRecord]:
    """Up to num_steps steps, after those of the newest checkpoint."""
    job = job_for(folder, mesh_shape)
    job.resume()
    for record in job.run():
        if record.step + 1 == num_steps:
            break
    return read_losses(folder / LOSSES)


def losses(records: list[StepRecord]) -> list[float]:
    return [record.loss for record in records]


@pytest.mark.parametrize("mesh_shape", [(2,), (1, 2), (4,), (2, 2)], ids=str)
def test_losses_equal_one_process(mesh_shape: tuple[int, ...], tmp_path: Path) -> None:
    one = train(tmp_path / "one", None)
    run_ranks(train, torch.Size(mesh_shape).numel(), tmp_path, tmp_path / "many", mesh_shape, deadline_s=120)
    many = read_losses(tmp_path / "many" / LOSSES)
    # fp32 sums in another order, 1e-7 each; Adam's division by the gradient's size lets a few steps multiply it.
    assert losses(many) == pytest.approx(losses(one), rel=2e-5)
    assert [r.balance for r in many] == pytest.approx([r.balance for r in one], rel=2e-5)
    assert losses(one)[-1] != losses(one)[0]


def whole_state(folder: Path, mesh_shape: tuple[int, ...] | None) -> bytes:
    """The newest checkpoint of `folder`, loaded on a mesh, as whole tensors."""
    job = job_for(folder, mesh_shape)
    assert job.resume() == 2
    state = checkpoint.state_of(job.model, job.optimizer)
    return packed({n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in state.items()})


def write_and_read(folder: Path, mesh_shape: tuple[int, ...]) -> bytes:
    train(folder, mesh_shape, num_steps=2)
    return whole_state(folder, mesh_shape)


@pytest.mark.parametrize(
    ("writer", "readers"), [((2,), [None, (4,), (1, 2)]), ((2, 2), [None, (2,)])], ids=str
)
def test_a_checkpoint_loads_on_any_mesh_exactly(
    writer: tuple[int, ...], readers: list[Any], tmp_path: Path
) -> None:
    num_ranks = torch.Size(writer).numel()
    written = unpacked(
        run_ranks(write_and_read, num_ranks, tmp_path, tmp_path / "run", writer, deadline_s=120)[0]
    )
    assert any("experts.weights.up.exp_avg" in name for name in written)
    for reader in readers:
        if reader is None:
            answers = [whole_state(tmp_path / "run", None)]
        else:
            answers = run_ranks(
                whole_state, torch.Size(reader).numel(), tmp_path, tmp_path / "run", reader, deadline_s=120
            )
        for answer in answers:
            read = unpacked(answer)
            assert read.keys() == written.keys()
            different = [name for name in read if not torch.equal(read[name], written[name])]
            assert not different, f"{writer} -> {reader}: {different}"


def test_resumed_losses_are_identical(tmp_path: Path) -> None:
    run_ranks(train, 2, tmp_path, tmp_path / "whole", (2,), deadline_s=120)
    run_ranks(train, 2, tmp_path, tmp_path / "cut", (2,), 3, deadline_s=120)  # one step past the checkpoint
    run_ranks(train, 2, tmp_path, tmp_path / "cut", (2,), deadline_s=120)
    whole, cut = (read_losses(tmp_path / name / LOSSES) for name in ("whole", "cut"))
    assert losses(cut) == losses(whole)
    assert len(whole) == STEPS


def test_half_a_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, None, num_steps=4)
    newest = checkpoint.complete(tmp_path)[-1]
    newest.rename(tmp_path / f".{newest.name}.partial")
    assert job_for(tmp_path, None).resume() == 2


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    train(tmp_path, None, num_steps=2)
    return tmp_path


def test_a_missing_shard_is_named(trained: Path) -> None:
    shard = next(checkpoint.complete(trained)[-1].glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name} has \d+ bytes, expected \d+; delete this folder"):
        job_for(trained, None).resume()
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        job_for(trained, None).resume()


def resumed_at_home(home: Path) -> tuple[str, float]:
    """Each rank in a folder of its own, as on nodes without a shared one; rank 1's lacks a file."""
    os.chdir(home / str(torch.distributed.get_rank()))
    job = job_for(Path("run"), (2,))
    start_s = time.monotonic()
    try:
        job.resume()
    except ValueError as error:
        return str(error), time.monotonic() - start_s
    return "no error", 0.0


def test_a_shard_that_one_rank_lacks_is_an_error_on_all(tmp_path: Path) -> None:
    train(tmp_path / "0" / "run", None, num_steps=2)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    shard = next(checkpoint.complete(tmp_path / "1" / "run")[-1].glob("*.distcp"))
    shard.unlink()
    for message, seconds_s in run_ranks(resumed_at_home, 2, tmp_path, tmp_path, deadline_s=60):
        assert f"{shard.name} is missing; delete this folder" in message
        assert seconds_s < 10  # told, not timed out


def test_another_model_is_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"is \[\d.* there and .* in this model"):
        job_for(trained, None, name="qwen3_moe").resume()


def test_other_settings_are_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer.learning_rate = 0.001, now 0.5; set it back"):
        job_for(trained, None, learning_rate=0.5).resume()


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    train(tmp_path, None)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000004", "step-00000006"]


def test_a_run_goes_on_with_the_same_text_alone(tmp_path: Path) -> None:
    job = job_for(tmp_path, None, digest="this")
    next(iter(job.run()))
    job.next_step = 2
    job.save()
    assert job_for(tmp_path, None, digest="this").resume() == 2
    with pytest.raises(ValueError, match="was trained on another text or with another tokenizer"):
        job_for(tmp_path, None, digest="that").resume()


def with_a_bad_rank(
    folder: Path, mesh_shape: tuple[int, ...], way: str, timeout_s: float
) -> tuple[str, float]:
    def batch_of(step: int) -> Tensor:
        if torch.distributed.get_rank() == 1 and step == 3:
            if way == "dies":
                os._exit(9)
            if way == "raises":
                raise ValueError("no text\nfor this step")
            if way == "hangs":
                time.sleep(3 * timeout_s)
        return batch(step)

    job = job_for(folder, mesh_shape, batch_of, timeout_s=timeout_s)
    if way.endswith(" while saving") and torch.distributed.get_rank() == 1:
        save = job.save

        def leave() -> Path:
            if job.next_step < 4:  # the first is whole
                return save()
            if way.startswith("hangs"):
                time.sleep(3 * timeout_s)  # by then the others have given up
            os._exit(9)

        job.save = leave  # type: ignore[method-assign]
    if way == "backward" and torch.distributed.get_rank() == 1:

        def fail(_: Tensor) -> None:
            if job.next_step == 3:
                raise ValueError("no text\nfor this step")

        # Of the first layer: the others are in the exchanges of its backward.
        job.reducer.layers[1].register_forward_hook(lambda _, __, y_TD: y_TD.register_hook(fail) and None)
    start_s = time.monotonic()
    try:
        for _ in job.run():
            start_s = time.monotonic()
    except (RuntimeError, ValueError) as error:
        if way in ("raises", "backward"):
            time.sleep(4)  # and its process goes on: nobody hears of it by a closed connection
        return str(error), time.monotonic() - start_s - 4 * (way in ("raises", "backward"))
    return "no error", 0.0


@pytest.mark.parametrize("way", ["dies", "hangs", "dies while saving", "hangs while saving"])
def test_a_rank_that_goes_is_an_error_on_the_others_in_time(way: str, tmp_path: Path) -> None:
    timeout_s = 4.0
    answers = run_ranks(
        with_a_bad_rank, 2, tmp_path, tmp_path / "run", (2,), way, timeout_s, deadline_s=120, may_die=(1,)
    )
    message, seconds_s = answers[0]
    assert message.startswith("rank 0, step 3: "), message
    assert message.endswith("the same command resumes after step 2"), message
    assert seconds_s < timeout_s + 5


def out_of_room(folder: Path, mesh_shape: tuple[int, ...] | None) -> tuple[str, list[str]]:
    job = job_for(folder, mesh_shape)
    steps = job.run()
    next(steps), next(steps)  # saved after two
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY)
    )  # as a disk with room for no shard
    try:
        for _ in steps:
            pass
    except (OSError, RuntimeError) as error:
        return str(error), [path.name for path in checkpoint.complete(folder)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "no error", []


@pytest.mark.parametrize("mesh_shape", [None, (2,)], ids=str)
def test_no_room_for_a_checkpoint_is_one_line_on_all(
    mesh_shape: tuple[int, ...] | None, tmp_path: Path
) -> None:
    num_ranks = 1 if mesh_shape is None else 2
    for message, complete in run_ranks(out_of_room, num_ranks, tmp_path, tmp_path / "run", mesh_shape):
        assert "step-00000004: rank " in message
        assert "cannot write it" in message
        assert "\n" not in message
        assert complete == ["step-00000002"]


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 2)])
@pytest.mark.parametrize("way", ["raises", "backward"])
def test_what_a_rank_raises_is_told_on_all_at_once(
    way: str, mesh_shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Within 3 seconds of a timeout of 60, though its process goes on."""
    num_ranks = 2 * len(mesh_shape)
    answers = run_ranks(
        with_a_bad_rank, num_ranks, tmp_path, tmp_path / "run", mesh_shape, way, 60.0, deadline_s=120
    )
    for rank, (message, seconds_s) in enumerate(answers):
        told = f"rank {rank}, step 3: rank 1 failed: ValueError: no text for this step; the same command resumes after step 2"
        assert message == ("no text\nfor this step" if rank == 1 else told)
        assert seconds_s < 3, (rank, seconds_s)


def disagreeing(folder: Path) -> None:
    rank = torch.distributed.get_rank()
    job_for(folder, (2,), learning_rate=1e-3 * (1 + rank))


def test_ranks_with_other_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the settings differs between ranks"):
        run_ranks(disagreeing, 2, tmp_path, tmp_path, deadline_s=60)


def test_a_new_model_each_time_in_the_same_folder(tmp_path: Path) -> None:
    """A folder that was emptied starts over."""
    first = train(tmp_path / "run", None, num_steps=2)
    shutil.rmtree(tmp_path / "run")
    assert losses(train(tmp_path / "run", None, num_steps=2)) == losses(first)
