"""A mesh of ranks, agreed on before anything is sent, and collectives that end in one clear error.

Dims "node" and "local": a rank has its counterparts on the other nodes along "node", its own node along "local".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

NODE, LOCAL = "node", "local"
TIMEOUT_S = 120.0


class ExchangeFailed(RuntimeError):
    """A collective did not end: a rank is gone, late, or does something else."""


def open_mesh(
    num_nodes: int, ranks_per_node: int, device_type: str = "cpu", timeout_s: float = TIMEOUT_S
) -> DeviceMesh:
    """The mesh of all ranks, ranks of a node next to each other, every collective on it limited to timeout_s.

    Ends on no rank before all are connected. Errors: ValueError on every rank when the shape does not suit the ranks
    or ranks ask for different meshes.
    """
    world = dist.get_world_size()
    agree(
        f"mesh of {num_nodes} nodes with {ranks_per_node} ranks, timeout {timeout_s:g} s",
        "open_mesh",
        device_type,
    )
    if num_nodes * ranks_per_node != world or min(num_nodes, ranks_per_node) < 1:
        raise ValueError(
            f"open_mesh: {num_nodes} nodes of {ranks_per_node} ranks are {num_nodes * ranks_per_node} ranks, torchrun "
            f"started {world}; give nodes x ranks a node = {world}"
        )
    mesh = init_device_mesh(device_type, (num_nodes, ranks_per_node), mesh_dim_names=(NODE, LOCAL))
    # New groups take the backend's default of 10 to 30 minutes, not that of the group they come from.
    for group in (mesh.get_group(NODE), mesh.get_group(LOCAL)):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
    # Connecting ends sooner on some ranks: one that then leaves would break off those that are still at it.
    with guarded("open_mesh: connecting"):
        dist.barrier()
    return mesh


def check_mesh(mesh: DeviceMesh) -> None:
    """Errors: ValueError unless the mesh has the dims "node" and "local", in this order, over all ranks."""
    if mesh.mesh_dim_names != (NODE, LOCAL) or mesh.size() != dist.get_world_size():
        raise ValueError(
            f'expected a mesh of all {dist.get_world_size()} ranks with the dims ("node", "local"), got '
            f"{mesh.mesh_dim_names} over {mesh.size()}; make it with monde.device.mesh.open_mesh"
        )


def agree(what: Any, who: str, device_type: str = "cpu") -> None:
    """Every rank brings the same `what` (anything JSON takes), or all raise a ValueError that shows the difference.

    One small collective over all ranks. Errors: ExchangeFailed when a rank does not come.
    """
    text = json.dumps(what, sort_keys=True)
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    mine = torch.tensor([digest], device=device_type)
    seen = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    with guarded(f"{who}: agreeing"):
        dist.all_gather(seen, mine)
        if len({int(one) for one in seen}) == 1:
            return
        texts: list[Any] = [None] * len(seen)
        dist.all_gather_object(texts, text)
    other = next(rank for rank, one in enumerate(texts) if one != texts[0])
    raise ValueError(
        f"{who}: ranks disagree: rank 0 has {texts[0]}, rank {other} has {texts[other]}; start all ranks with the "
        "same arguments"
    )


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turn what backends raise for dead and late ranks into one line. The process group is of no use afterwards."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ExchangeFailed):
            raise
        cause = " ".join(str(error).split())[:200]
        raise ExchangeFailed(
            f"{what}: rank {dist.get_rank()} did not hear from another rank, which has ended, is stuck or calls "
            f"something else; look at the first error among all ranks and start them again ({cause})"
        ) from error
