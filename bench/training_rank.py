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
from bench.rounds import paired
from bench.training_peers import CAPACITIES, deepspeed_layers, deepspeed_loss, dropped_share
from hostcompute import DType, ExpertSpec
from monde.planning.pipeline import Degrees, layer_timeline
from monde.planning.training_profile import BACKWARD, FORWARD, DegreePlanner, Observation
from monde.routing.gates import make_gate
from monde.training.auto import CONFIRM_ROUNDS, TRIAL_ROUNDS, agreed
from monde.training.fabric import Fabric
from monde.training.layer import MoELayer
from monde.training.profiling import profile_layer

SHAPE = {"num_experts": 8, "d_model": 256, "d_ffn": 1024, "tokens": 2048, "top_k": 2}  # tokens of a node
ROUNDS = 15
TIMEOUT = timedelta(seconds=120)
UNSCHEDULED, SCHEDULED = "unscheduled", "scheduled"
# Where experts lie: a mesh (node, local), or one dim, as DeepSpeed has them.
CUT, WHOLE = "cut in the node", "whole"


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
    fabrics = {CUT: Fabric(mesh, timeout=TIMEOUT)}
    if per_node > 1:
        flat = init_device_mesh("cpu", (2 * per_node,), mesh_dim_names=("rank",))
        fabrics[WHOLE] = Fabric(flat, timeout=TIMEOUT)
    found = {}
    for mbit in arguments.mbit:
        if mesh.get_local_rank("local") == 0:
            shape_link(os.environ["GLOO_SOCKET_IFNAME"], mbit)
        dist.barrier()
        found[f"{mbit:g}"] = measured(fabrics, SHAPE["tokens"] // per_node, arguments.peers)
        if dist.get_rank() == 0:
            arguments.out.write_text(json.dumps(found))
    dist.barrier()
    for fabric in fabrics.values():
        fabric.close()
    dist.destroy_process_group()


class Ours:
    """The layer on one mesh, at the degrees that its profile and a few trials settle."""

    def __init__(self, fabric: Fabric, spec: ExpertSpec, x_TD: Tensor) -> None:
        torch.manual_seed(0)  # the same gate and experts, however they lie
        gate = make_gate("gshard", spec.d_model, spec.num_experts, top_k=SHAPE["top_k"])
        self.layer = MoELayer(
            gate=gate, experts=spec, mesh=fabric
        ).eval()  # without noise: all rounds route alike
        self.fabric, self.x_TD = fabric, x_TD
        self.step(Degrees())
        assert self.layer.experts.load is not None
        self.rows = self.layer.experts.load.busiest_rows
        # As training/auto.py does in its first steps: measure, try what is worth it, settle.
        self.planner = DegreePlanner(profile_layer(self.layer.experts, self.rows))
        self.tried: list[Observation] = []
        for degrees in self.planner.trials(self.rows) * TRIAL_ROUNDS:
            self.tried += self.step(degrees)[1]
        self.planner.settle(self.rows, self.tried)
        self.planner.correct(self.tried)
        confirming = self.planner.to_confirm(self.rows, CONFIRM_ROUNDS)
        if confirming:
            both = [one for degrees in confirming for one in self.step(degrees)[1]]
            self.planner.confirm(self.rows, both)
            self.tried += both
        self.ways = {UNSCHEDULED: Degrees(), SCHEDULED: self.planner(self.rows)}
        self.seen: dict[str, list[Observation]] = {name: [] for name in self.ways}

    def step(self, degrees: Degrees) -> tuple[float, list[Observation]]:
        self.layer.zero_grad()
        self.layer.experts.schedule = degrees
        self.fabric.observations = []
        seconds_s = step_s(lambda x: self.layer(x).square().sum(), self.x_TD)
        seen = agreed(self.fabric.observations, self.fabric)
        self.fabric.observations = None
        return seconds_s, seen

    def timed(self, name: str) -> float:
        seconds_s, seen = self.step(self.ways[name])
        self.seen[name] += seen
        return seconds_s

    def check(self) -> None:
        """Gradients of both ways are one, up to the rounding of sums."""
        grads = []
        for degrees in self.ways.values():
            self.step(degrees)
            grads.append([p.grad.clone() for p in self.layer.parameters() if p.grad is not None])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))

    def found(self) -> dict[str, Any]:
        profile = self.planner.profile
        predictions = [
            {
                "way": name,
                "direction": way,
                "degree": degree,
                "predicted_s": layer_timeline(
                    profile.stages(way, self.rows), degree, profile.contention
                ).makespan_s,
                "measured_s": statistics.median(s.total_s for s in self.seen[name] if s.direction == way),
            }
            for name, degrees in self.ways.items()
            for way, degree in ((FORWARD, degrees.forward), (BACKWARD, degrees.backward))
        ]
        return {
            "profile": asdict(profile),
            "busiest_rows": self.rows,
            "degrees": {name: asdict(degrees) for name, degrees in self.ways.items()},
            "trials": [asdict(one) for one in self.tried],
            "predictions": predictions,
        }


def measured(fabrics: dict[str, Fabric], num_tokens: int, peers: bool) -> dict[str, Any]:
    """Everybody in turn, at one speed of the link."""
    spec = ExpertSpec(SHAPE["num_experts"], SHAPE["d_model"], SHAPE["d_ffn"], dtype=DType.F32)
    torch.manual_seed(dist.get_rank())
    x_TD = torch.randn(num_tokens, spec.d_model)
    ours = {where: Ours(fabric, spec, x_TD) for where, fabric in fabrics.items()}
    others = deepspeed_layers(spec, SHAPE["top_k"]) if peers else {}
    steps: dict[str, Callable[[], float]] = {
        f"{name}, {where}": partial(one.timed, name) for where, one in ours.items() for name in one.ways
    }
    steps |= {name: partial(step_s, partial(deepspeed_loss, peer), x_TD) for name, peer in others.items()}
    for one in ours.values():
        one.check()
    dropped = {
        name: dropped_share(peer, x_TD, SHAPE["top_k"], CAPACITIES[name]) for name, peer in others.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(ROUNDS):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(steps[name]())
    return {
        "step_s": samples,
        "gain": {
            where: paired(samples[f"{UNSCHEDULED}, {where}"], samples[f"{SCHEDULED}, {where}"])
            for where in ours
        },
        "dropped_share": dropped,
        "layers": {where: one.found() for where, one in ours.items()},
    }


def step_s(loss_of: Callable[[Tensor], Tensor], x_TD: Tensor) -> float:
    leaf_TD = x_TD.clone().requires_grad_()
    dist.barrier()
    start_s = time.perf_counter()
    loss_of(leaf_TD).backward()
    dist.barrier()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
