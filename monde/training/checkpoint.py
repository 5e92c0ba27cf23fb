"""Checkpoints of a training run: whole or absent, and independent of how experts lie on ranks.

A checkpoint is a folder step-NNNNNNNN of torch.distributed.checkpoint, written beside its place and renamed into it when
all ranks are done. Experts are stored as parts of whole parameters, so that any mesh reads what any other wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state

from monde.device.notices import is_of_a_backend, one_line
from monde.training.fabric import Fabric
from monde.training.layer import ShardedExperts
from monde.training.whole import as_part

RUN_FILE = "run.json"
VERSION = 1


@dataclass(frozen=True)
class Run:
    """What a checkpoint says of itself. shapes: of all parameters over all ranks."""

    step: int
    settings: dict[str, Any]
    shapes: dict[str, list[int]]
    files: dict[str, int]  # bytes by name


def _experts_of(model: nn.Module) -> dict[str, tuple[ShardedExperts, str]]:
    """Parameters that are parts, by full name."""
    return {
        f"{prefix}.weights.{name}": (module, name)
        for prefix, module in model.named_modules()
        if isinstance(module, ShardedExperts)
        for name in module.weights.weights()
    }


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Every tensor under a name that no mesh changes; they share memory with the model's and the optimizer's."""
    parts = _experts_of(model)

    def part(name: str, tensor: Tensor) -> Tensor:
        if name not in parts:
            return tensor
        module, short = parts[name]
        is_shaped = tensor.shape == module.weights.get_parameter(short).shape and tensor.dim() > 0
        return as_part(module.weights, short, tensor) if is_shaped else tensor

    state = {f"model.{name}": part(name, tensor.detach()) for name, tensor in model.state_dict().items()}
    if optimizer is not None:
        for name, param in model.named_parameters():
            for key, value in optimizer.state.get(param, {}).items():
                state[f"optimizer.{name}.{key}"] = part(name, value)
    return state


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in state_of(model).items()}


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    fabric: Fabric,
    settings: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep`. Collective.

    Errors: OSError on all ranks where one cannot write; RuntimeError of the backend where a rank is gone.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def publish() -> None:
        files = {path.name: path.stat().st_size for path in partial.iterdir()}
        run = {
            "version": VERSION, "step": step, "settings": settings, "shapes": shapes, "files": files,
        }  # fmt: skip
        _write_durably(partial / RUN_FILE, json.dumps(run, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)

    shapes = _shapes(model)
    fabric.first_does(prepare)
    writer = FileSystemWriter(partial, sync_files=True)
    group = fabric.everyone
    with _one_process_is_fine(), _causes_of_failure(final):
        write_state(
            state_of(model, optimizer), storage_writer=writer, process_group=group, no_dist=group is None
        )
    fabric.first_does(publish)
    return final


@contextmanager
def _causes_of_failure(final: Path) -> Iterator[None]:
    """In place of torch's CheckpointException, which is no Exception and as long as all ranks' tracebacks."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, KeyboardInterrupt) or is_of_a_backend(cause):
            raise cause from error
        raise OSError(
            f"{final}: rank {rank} cannot write it ({one_line(cause)[:200]}); make room, or name another output.folder: "
            "the same command resumes from the checkpoint before"
        ) from error


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """So that a rename outlives the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(folder: Path) -> list[Path]:
    """Checkpoints whose writing was finished, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{RUN_FILE}"))


def read_run(path: Path) -> Run:
    """Errors: ValueError when the folder is no checkpoint, of another version, or lacks part of a file."""
    try:
        data = json.loads((path / RUN_FILE).read_text())
        version = data.pop("version")
        run = Run(**data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a training checkpoint ({error}); name a folder step-NNNNNNNN"
        ) from error
    if version != VERSION:
        raise ValueError(
            f"{path}: checkpoint version {version}, expected {VERSION}; use the monde that wrote it"
        )
    for name, size_bytes in run.files.items():
        there = (path / name).stat().st_size if (path / name).exists() else None
        if there != size_bytes:
            found = "is missing" if there is None else f"has {there} bytes, expected {size_bytes}"
            raise ValueError(
                f"{path}: {name} {found}; delete this folder to resume from the checkpoint before it"
            )
    return run


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fabric: Fabric) -> Run:
    """Values into model and optimizer, in place; whatever mesh wrote them. Collective.

    Errors, on all ranks when one has them: ValueError as read_run, and for a model of other parameters or shapes.
    """
    run = fabric.all_do(lambda: _fitting(path, model))
    _make_state(optimizer)
    group = fabric.everyone
    state = state_of(model, optimizer)
    with _one_process_is_fine():
        read_state(state, storage_reader=FileSystemReader(path), process_group=group, no_dist=group is None)
    return run


def _fitting(path: Path, model: nn.Module) -> Run:
    run = read_run(path)
    for name, (here, there) in _differences(_shapes(model), run.shapes):
        raise ValueError(
            f"{path}: {name} is {there or 'absent'} there and {here or 'absent'} in this model; "
            "train the model that wrote the checkpoint, or give another output folder"
        )
    return run


def _differences(
    mine: dict[str, list[int]], theirs: dict[str, list[int]]
) -> Iterator[tuple[str, tuple[list[int] | None, list[int] | None]]]:
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            yield name, (mine.get(name), theirs.get(name))


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """A step that changes nothing: optimizers make their state in the first one."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
