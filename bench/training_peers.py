"""DeepSpeed-MoE as its users configure it, on the ranks of bench/training_rank.py; needs `pip install deepspeed`.

Its layer pads every expert to one capacity, exchanges equal parts over all ranks, and overlaps nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hostcompute import ExpertSpec
from monde.device.collectives import start_all_to_all

# DeepSpeed's examples train with 1.0 to 1.25; FSMoE measures with 1.2.
CAPACITIES = {"deepspeed, capacity 1.2": 1.2, "deepspeed, nothing dropped": None}


class _Expert(nn.Module):
    """What ours compute: down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.d_model, spec.d_ffn, bias=False)
        self.up = nn.Linear(spec.d_model, spec.d_ffn, bias=False)
        self.down = nn.Linear(spec.d_ffn, spec.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def deepspeed_layers(spec: ExpertSpec, top_k: int) -> dict[str, nn.Module]:
    """Experts whole, E / W on each of the W ranks. Collective. Errors: ImportError without deepspeed.

    Its all-to-all goes by ours, which on Gloo posts receives first: twice as fast on a slow link as what it would get.
    """
    deepspeed: Any = importlib.import_module("deepspeed")
    moe: Any = importlib.import_module("deepspeed.moe.layer")
    sharded: Any = importlib.import_module("deepspeed.moe.sharded_moe")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)

    def all_to_all_single(output: Tensor, x: Tensor, group: Any = None) -> None:
        each = [output.shape[0] // dist.get_world_size(group)] * dist.get_world_size(group)
        start_all_to_all(output, x, each, each, group)()

    sharded.dist.all_to_all_single = all_to_all_single
    layers: dict[str, nn.Module] = {}
    for name, capacity in CAPACITIES.items():
        layer = moe.MoE(
            spec.d_model, _Expert(spec), spec.num_experts, ep_size=dist.get_world_size(), k=top_k,
            capacity_factor=capacity or 1.0, drop_tokens=capacity is not None,
        )  # fmt: skip
        layer.set_deepspeed_parallelism()  # as deepspeed.initialize does
        layers[name] = layer
    return layers


def deepspeed_loss(layer: nn.Module, x_TD: Tensor) -> Tensor:
    y: Tensor = layer(x_TD[None])[0]
    return y.square().sum()


def dropped_share(layer: nn.Module, x_TD: Tensor, top_k: int, capacity: float | None) -> float:
    """Pairs of this rank's tokens with experts that found no room."""
    counts_E: Tensor = layer(x_TD[None])[2]
    if capacity is None:
        return 0.0
    room = torch.tensor(capacity * top_k * len(x_TD) / len(counts_E)).ceil()
    return float((counts_E - room).clamp(min=0).sum() / (top_k * len(x_TD)))
