"""A rank's slice of an experts' parameter as part of the whole: what checkpoints and conversion speak of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from monde.training.experts import F_DIM, ExpertWeights


def placements(name: str, num_mesh_dims: int) -> list[Placement]:
    """Experts along the first dim of the mesh, F along the second."""
    dim = F_DIM[name]
    inside: Placement = Replicate() if dim is None else Shard(dim)
    return [Shard(0), inside][:num_mesh_dims]


def as_part(weights: ExpertWeights, name: str, local: Tensor) -> Tensor:
    """`local` (a parameter, or a tensor of its shape) as a DTensor of the global shape, without a copy.

    One process: `local` itself.
    """
    mesh = weights.fabric.mesh
    if mesh is None:
        return local
    shape = torch.Size(weights.global_shapes()[name])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local.detach(), mesh, placements(name, mesh.ndim), run_check=False, shape=shape, stride=stride
    )


def gathered(weights: ExpertWeights, name: str) -> Tensor:
    """The whole parameter, on every rank. Collective."""
    part = as_part(weights, name, weights.get_parameter(name).detach())
    return part.full_tensor() if isinstance(part, DTensor) else part
