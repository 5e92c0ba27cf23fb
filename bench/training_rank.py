"""One rank of `bench.training nodes`: profile the layer, check it, then time it unscheduled, as planned, and peers, in turn.

Rank 0 writes what all agree on. A step is one layer forward and backward, from one barrier to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from bench.emulated_nodes import shape_link
from bench.training_peers import CAPACITIES, deepspeed_layers, deepspeed_loss, dropped_share
from hostcompute import DType, ExpertSpec
from monde.planning.pipeline import Degrees, layer_timeline
from monde.planning.training_profile import BACKWARD, FORWARD, DegreePlanner
from monde.routing.gates import make_gate
from monde.training.auto import agreed
from monde.training.fabric import Fabric
from monde.training.layer import MoELayer
from monde.training.profiling import profile_layer

SHAPE = {"num_experts": 8, "d_model": 256, "d_ffn": 1024, "tokens": 2048, "top_k": 2}  # tokens of a node
ROUNDS, TRIAL_ROUNDS = 10, 3
TIMEOUT = timedelta(seconds=120)
UNSCHEDULED, SCHEDULED = "unscheduled", "scheduled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbit", type=float, nargs="+", required=True)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    mesh = init_device_mesh("cpu", (2, per_node), mesh_dim_names=("node", "local"))
    fabric = Fabric(mesh, timeout=TIMEOUT)
    found = {}
    for mbit in arguments.mbit:
        if fabric.local_idx == 0:
            shape_link(os.environ["GLOO_SOCKET_IFNAME"], mbit)
        dist.barrier()
        found[f"{mbit:g}"] = measured(fabric, SHAPE["tokens"] // per_node, arguments.peers)
        if dist.get_rank() == 0:
            arguments.out.write_text(json.dumps(found))
    dist.barrier()
    fabric.close()
    dist.destroy_process_group()


def measured(fabric: Fabric, num_tokens: int, peers: bool) -> dict[str, Any]:
    spec = ExpertSpec(SHAPE["num_experts"], SHAPE["d_model"], SHAPE["d_ffn"], dtype=DType.F32)
    torch.manual_seed(0)
    gate = make_gate("gshard", spec.d_model, spec.num_experts, top_k=SHAPE["top_k"])
    layer = MoELayer(gate=gate, experts=spec, mesh=fabric).eval()  # without noise: every round routes alike
    others = deepspeed_layers(spec, SHAPE["top_k"]) if peers else {}
    torch.manual_seed(dist.get_rank())
    x_TD = torch.randn(num_tokens, spec.d_model)

    def ours(degrees: Degrees) -> float:
        layer.zero_grad()
        layer.experts.schedule = degrees
        return step_s(lambda x: layer(x).square().sum(), x_TD)

    ours(Degrees())
    assert layer.experts.load is not None
    rows = layer.experts.load.busiest_rows
    planner, tried = planned(fabric, layer, rows, ours)
    ways = {UNSCHEDULED: Degrees(), SCHEDULED: planner(rows)}
    must_compute_the_same(layer, [partial(ours, degrees) for degrees in ways.values()])
    steps: dict[str, Callable[[], float]] = {
        name: partial(ours, degrees) for name, degrees in ways.items()
    } | {name: partial(step_s, partial(deepspeed_loss, peer), x_TD) for name, peer in others.items()}
    for name in others:
        steps[name]()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    totals: dict[str, dict[str, list[float]]] = {name: {FORWARD: [], BACKWARD: []} for name in ways}
    for i in range(ROUNDS):
        for name in list(steps)[i % len(steps) :] + list(steps)[: i % len(steps)]:
            fabric.observations = []
            samples[name].append(steps[name]())
            for one in agreed(fabric.observations, fabric) if name in ways else []:
                totals[name][one.direction].append(one.total_s)
            fabric.observations = None
    profile = planner.profile
    predictions = [
        {
            "way": name,
            "direction": way,
            "degree": degree,
            "predicted_s": layer_timeline(
                profile.stages(way, rows), degree, profile.contention
            ).makespan_s,
            "measured_s": statistics.median(totals[name][way]),
        }
        for name, degrees in ways.items()
        for way, degree in ((FORWARD, degrees.forward), (BACKWARD, degrees.backward))
    ]
    return {
        "profile": asdict(profile),
        "busiest_rows": rows,
        "degrees": {name: asdict(degrees) for name, degrees in ways.items()},
        "trials": [asdict(one) for one in tried],
        "step_s": samples,
        "predictions": predictions,
        "dropped_share": {
            name: dropped_share(peer, x_TD, SHAPE["top_k"], CAPACITIES[name]) for name, peer in others.items()
        },
    }


def step_s(loss_of: Callable[[Tensor], Tensor], x_TD: Tensor) -> float:
    leaf_TD = x_TD.clone().requires_grad_()
    dist.barrier()
    start_s = time.perf_counter()
    loss_of(leaf_TD).backward()
    dist.barrier()
    return time.perf_counter() - start_s


def planned(
    fabric: Fabric, layer: MoELayer, rows: int, ours: Callable[[Degrees], float]
) -> tuple[DegreePlanner, list[Any]]:
    """As training/auto.py does in its first steps: measure, try what is worth it, settle."""
    planner = DegreePlanner(profile_layer(layer.experts, rows))
    tried = []
    for degrees in planner.trials(rows) * TRIAL_ROUNDS:
        fabric.observations = []
        ours(degrees)
        tried += agreed(fabric.observations, fabric)
        fabric.observations = None
    planner.settle(rows, tried)
    planner.correct(tried)
    return planner, tried


def must_compute_the_same(layer: MoELayer, steps: list[Callable[[], float]]) -> None:
    """Gradients of all ways, up to the rounding of sums."""
    reference: list[Tensor] | None = None
    for step in steps:
        step()
        grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        for a, b in zip(grads, reference or grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        reference = grads


if __name__ == "__main__":
    main()
