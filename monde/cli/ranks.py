"""The command line under torchrun: one process a rank, one table, on rank 0."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

P = ParamSpec("P")


def on_first_rank(command: Callable[P, None]) -> Callable[P, None]:
    """`command`, which every rank would do alike: under torchrun rank 0 does it, the others leave at once."""

    @functools.wraps(command)
    def on_first(*args: P.args, **options: P.kwargs) -> None:
        import torch.distributed as dist

        if dist.is_torchelastic_launched() and int(os.environ["RANK"]) > 0:  # as torchrun sets it
            return
        command(*args, **options)

    return on_first


@contextlib.contextmanager
def torchrun_mesh(device: str | None) -> Iterator[Any]:
    """All ranks as a 1-D mesh, of GPUs where there are some; None in a process that torchrun did not start, or alone.

    device: where dense weights shall run, "cpu" even next to a GPU.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_torchelastic_launched():
        yield None
        return
    kind = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
    dist.init_process_group({"cpu": "gloo", "cuda": "nccl"}[kind])
    try:
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
        yield mesh if mesh.size() > 1 else None
    finally:
        dist.destroy_process_group()


def refuse_over_ranks(option: str, value: Any) -> None:
    """Errors: ValueError where `option` was given: it is for one process."""
    if value:
        raise ValueError(f"{option} measures one process; leave it out, or run monde bench without torchrun")


def torchrun_command(command: str, mesh: Any) -> str:
    """What was typed, as the context has it, with what started this rank."""
    if mesh is None:
        return command
    num_here = int(os.environ["LOCAL_WORLD_SIZE"])  # as torchrun sets it
    nodes = f"--nnodes {mesh.size() // num_here} " if num_here < mesh.size() else ""
    return f"torchrun {nodes}--nproc-per-node {num_here} -m monde {command.removeprefix('monde ')}"
