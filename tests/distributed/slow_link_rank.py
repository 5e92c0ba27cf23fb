"""One rank of test_slow_link.py: a training layer, or an exchange between nodes, over a link of a given speed."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bench.emulated_nodes import shape_link
from hostcompute import DType, ExpertSpec
from monde.device.mesh import open_mesh
from monde.planning.exchange import Strategy
from monde.planning.pipeline import Degrees
from monde.routing.gates import make_gate
from monde.training.dispatch import NodeExchange, Way
from monde.training.fabric import Fabric
from monde.training.layer import MoELayer

D, TOKENS = 256, 1024  # about a megabyte to the other node, forward and backward


def training(timeout_s: float) -> Callable[[], Tensor]:
    fabric = Fabric(open_mesh(2, 1, timeout_s=timeout_s), timeout=timedelta(seconds=timeout_s))
    torch.manual_seed(0)
    spec = ExpertSpec(4, D, 16, dtype=DType.F32)
    layer = MoELayer(
        gate=make_gate("gshard", D, 4, top_k=2), experts=spec, mesh=fabric, schedule=Degrees(2, 3)
    )
    layer.eval()
    x_TD = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> Tensor:
        leaf_TD = x_TD.clone().requires_grad_()
        layer(leaf_TD).square().sum().backward()
        assert leaf_TD.grad is not None
        return leaf_TD.grad

    return step


def dispatch(timeout_s: float) -> Callable[[], Tensor]:
    exchange = NodeExchange(open_mesh(2, 1, timeout_s=timeout_s), Way(Strategy.PIPELINED, 4))
    routes = exchange.routes([TOKENS, TOKENS])
    x_RD = torch.randn(2 * TOKENS, D, generator=torch.Generator().manual_seed(dist.get_rank()))
    return lambda: exchange.combine(exchange.dispatch(x_RD, routes), routes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["training", "dispatch"])
    parser.add_argument("--mbit", type=float, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    step = {"training": training, "dispatch": dispatch}[arguments.what](arguments.timeout_s)
    fast = step()
    dist.barrier()
    shape_link(os.environ["GLOO_SOCKET_IFNAME"], arguments.mbit)
    start_s = time.monotonic()
    told = ""
    try:
        assert torch.equal(step(), fast), "a slow link changed the answer"
    except RuntimeError as error:  # what the others' failing does to the connection comes as one, too
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    found = {"told": told, "seconds_s": time.monotonic() - start_s}
    (arguments.folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    os._exit(0)  # after a failure the process group is of no use, not even to be taken down


if __name__ == "__main__":
    main()
