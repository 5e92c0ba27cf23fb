"""One rank of test_slow_link.py: experts in inference or in training, or an exchange between nodes, over a link of a
given speed.
"""

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
from torch.distributed.device_mesh import init_device_mesh

from bench.emulated_nodes import shape_link
from hostcompute import DType, ExpertSpec
from monde.device.mesh import open_mesh
from monde.executors.ranked import RankedExecutor
from monde.executors.ranks import RankGroup
from monde.executors.sharded import ShardedExecutor
from monde.planning.exchange import Strategy
from monde.planning.pipeline import Degrees
from monde.planning.sharding import BatchPlan, RankedCounts, WayFactors, assign_experts
from monde.planning.sharding import Way as PlannedWay
from monde.routing.gates import make_gate
from monde.training.dispatch import NodeExchange, Way
from monde.training.fabric import Fabric
from monde.training.layer import MoELayer
from tests.distributed.moe import Case, compute_of, slices

D, TOKENS = 256, 1024  # about a megabyte to the other node, forward and backward


def inference(timeout_s: float) -> Callable[[], Tensor]:
    ranks = RankGroup(init_device_mesh("cpu", (2,)), timeout_s)
    case = Case(ExpertSpec(4, D, 32, DType.F32), (TOKENS, TOKENS), num_topk=2)
    part, home_W1 = slices(case.spec, (0, 16, 32))[ranks.rank], assign_experts(4, 2)
    sharded = ShardedExecutor(ranks, compute_of(part, case.experts(), "auto"))

    def plan(counts: RankedCounts, factors: WayFactors) -> BatchPlan:
        return BatchPlan(PlannedWay.SHARDED, 2, 0, 0, 1)

    executor = RankedExecutor(ranks, 0, home_W1, plan, sharded, None)
    batch = case.batch(ranks.rank)
    return lambda: executor.forward(batch)


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


WHAT = {"inference": inference, "training": training, "dispatch": dispatch}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--mbit", type=float, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    step = WHAT[arguments.what](arguments.timeout_s)
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
