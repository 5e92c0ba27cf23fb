"""Scheduled training of mixture-of-experts layers: the simulator's study, and real runs on emulated nodes.

    python -m bench.training layers                      the paper's 1458 layers and two models, simulated
    python -m bench.training nodes [--mbit 200 ...]      two network namespaces, a shaped link, one rank each (as root)

A run measures the same layer unscheduled (one chunk) and as the profile plans it, in turns, after a check that both give
the same outputs and gradients; and what the simulator predicted for either.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from bench import artefact
from bench.training_layers import study

LINKS_MBIT = (0, 100, 200, 400, 1000)  # 0: as fast as the kernel is
SHAPE = {"num_experts": 8, "d_model": 256, "d_ffn": 1024, "tokens": 2048, "top_k": 2}
ROUNDS, TRIAL_ROUNDS = 8, 3
NODES = ("monde-node0", "monde-node1")
ADDRESS = "10.77.0.{}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def make_nodes(mbit: int) -> None:
    remove_nodes()
    for node in NODES:
        ip("netns", "add", node)
    ip(
        "link",
        "add",
        "mveth0",
        "netns",
        NODES[0],
        "type",
        "veth",
        "peer",
        "name",
        "mveth1",
        "netns",
        NODES[1],
    )
    for i, node in enumerate(NODES):
        ip("-n", node, "addr", "add", f"{ADDRESS.format(i + 1)}/24", "dev", f"mveth{i}")
        for device in ("lo", f"mveth{i}"):
            ip("-n", node, "link", "set", device, "up")
        if mbit:
            shape = f"root tbf rate {mbit}mbit burst 128kb limit 4mb".split()
            subprocess.run(["tc", "-n", node, "qdisc", "add", "dev", f"mveth{i}", *shape], check=True)


def remove_nodes() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], capture_output=True)


def run_nodes(mbit: int, per_node: int, out: Path) -> dict[str, Any]:
    """One rank a core's worth; what the first rank wrote."""
    make_nodes(mbit)
    try:
        ranks = []
        for rank in range(2 * per_node):
            node = rank // per_node
            environment = os.environ | {
                "MASTER_ADDR": ADDRESS.format(1), "MASTER_PORT": "29577", "RANK": str(rank), "OMP_NUM_THREADS": "1",
                "WORLD_SIZE": str(2 * per_node), "GLOO_SOCKET_IFNAME": f"mveth{node}",
            }  # fmt: skip
            words = [
                "ip",
                "netns",
                "exec",
                NODES[node],
                sys.executable,
                "-m",
                "bench.training",
                "rank",
                str(per_node),
                str(out),
            ]
            ranks.append(subprocess.Popen(words, env=environment))
        codes = [process.wait(timeout=240) for process in ranks]
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}; see above")
    finally:
        for process in ranks:
            process.kill()
        remove_nodes()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def rank_main(per_node: int, out: Path) -> None:
    """One rank: profile, check, measure in turns."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from hostcompute import DType, ExpertSpec
    from monde.planning.pipeline import Degrees, layer_timeline
    from monde.planning.training_profile import BACKWARD, FORWARD, DegreePlanner
    from monde.routing.gates import make_gate
    from monde.training.auto import agreed
    from monde.training.fabric import Fabric
    from monde.training.layer import MoELayer
    from monde.training.profiling import profile_layer

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (2, per_node), mesh_dim_names=("node", "local"))
    fabric = Fabric(mesh, timeout=timedelta(seconds=120))
    spec = ExpertSpec(SHAPE["num_experts"], SHAPE["d_model"], SHAPE["d_ffn"], dtype=DType.F32)
    torch.manual_seed(0)
    gate = make_gate("gshard", spec.d_model, spec.num_experts, top_k=SHAPE["top_k"])
    layer = MoELayer(gate=gate, experts=spec, mesh=fabric).eval()  # without noise: every round routes alike
    torch.manual_seed(dist.get_rank())
    x = torch.randn(SHAPE["tokens"] // per_node, spec.d_model)

    def step() -> float:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        dist.barrier()
        start_s = time.perf_counter()
        layer(leaf).square().sum().backward()
        dist.barrier()
        return time.perf_counter() - start_s

    step()
    assert layer.experts.load is not None
    rows = layer.experts.load.busiest_rows
    profile = profile_layer(layer.experts, rows)
    planner = DegreePlanner(profile)
    tried = []
    for degrees in planner.trials(rows) * TRIAL_ROUNDS:  # as training/auto.py does in its first steps
        layer.experts.schedule = degrees
        fabric.observations = []
        step()
        tried += agreed(fabric.observations, fabric)
        fabric.observations = None
    planner.settle(rows, tried)
    planner.correct(tried)
    profile = planner.profile
    ways = {"unscheduled": Degrees(1, 1), "scheduled": planner(rows)}
    reference = None
    for degrees in ways.values():
        layer.experts.schedule = degrees
        step()
        grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        if reference is not None:
            for a, b in zip(reference, grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
        reference = grads
    samples: dict[str, list[float]] = {name: [] for name in ways}
    totals: dict[str, dict[str, list[float]]] = {name: {FORWARD: [], BACKWARD: []} for name in ways}
    seen = []
    for i in range(ROUNDS):
        for name in ways if i % 2 else list(ways)[::-1]:
            layer.experts.schedule = ways[name]
            fabric.observations = []
            samples[name].append(step())
            looked = agreed(fabric.observations, fabric)
            fabric.observations = None
            seen += [asdict(one) for one in looked] if name == "scheduled" else []
            for one in looked:
                totals[name][one.direction].append(one.total_s)
    predictions = []
    for name, degrees in ways.items():
        for way, degree in ((FORWARD, degrees.forward), (BACKWARD, degrees.backward)):
            predicted_s = layer_timeline(profile.stages(way, rows), degree, profile.contention).makespan_s
            measured_s = statistics.median(totals[name][way])
            predictions.append(
                {
                    "way": name,
                    "direction": way,
                    "degree": degree,
                    "predicted_s": predicted_s,
                    "measured_s": measured_s,
                }
            )
    if dist.get_rank() == 0:
        found = {
            "profile": asdict(profile), "busiest_rows": rows, "degrees": {n: asdict(d) for n, d in ways.items()},
            "trials": [asdict(one) for one in tried], "step_s": samples, "predictions": predictions, "observations": seen,
        }  # fmt: skip
        out.write_text(json.dumps(found))
    dist.barrier()
    fabric.close()


def describe(mbit: int, per_node: int, found: dict[str, Any]) -> None:
    medians = {name: statistics.median(values) for name, values in found["step_s"].items()}
    errors = [p["predicted_s"] / p["measured_s"] - 1 for p in found["predictions"]]
    degrees = found["degrees"]["scheduled"]
    print(
        f"{mbit or 'unshaped':>8} Mbit/s, 2 x {per_node}: {1e3 * medians['unscheduled']:.1f} -> "
        f"{1e3 * medians['scheduled']:.1f} ms, {medians['unscheduled'] / medians['scheduled']:.2f}x, chunks "
        f"{degrees['forward']}/{degrees['backward']}; simulator off by "
        + ", ".join(f"{e:+.0%}" for e in errors),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("layers").add_argument("--out", type=Path)
    nodes = commands.add_parser("nodes")
    nodes.add_argument("--mbit", type=int, nargs="+", default=LINKS_MBIT)
    nodes.add_argument("--per-node", type=int, default=1, help="ranks of a node")
    nodes.add_argument("--out", type=Path)
    rank = commands.add_parser("rank", help="one rank; started by nodes")
    rank.add_argument("per_node", type=int)
    rank.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "rank":
        rank_main(arguments.per_node, arguments.out)
    elif arguments.command == "layers":
        artefact.write(
            "training-layers",
            {"assumptions": sys.modules["bench.training_layers"].__doc__},
            study(),
            arguments.out,
        )
    else:
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            for mbit in arguments.mbit:
                found = run_nodes(mbit, arguments.per_node, Path(folder) / "result.json")
                describe(mbit, arguments.per_node, found)
                results[str(mbit)] = found
        configuration = SHAPE | {
            "rounds": ROUNDS,
            "trial_rounds": TRIAL_ROUNDS,
            "nodes": 2,
            "ranks_per_node": arguments.per_node,
        }
        artefact.write("training-nodes", configuration, results, arguments.out)


if __name__ == "__main__":
    main()
