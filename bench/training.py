"""Scheduled training of mixture-of-experts layers: the simulator's study, and real runs on emulated nodes.

    python -m bench.training layers                      the paper's 1458 layers and two models, simulated
    python -m bench.training nodes [--mbit 200 ...]      two network namespaces and a shaped link (as root)

A run of nodes measures the same layer unscheduled (one chunk), as the profile plans it, and with --peers DeepSpeed-MoE,
in turn, after a check that both of ours give the same gradients; and what the simulator predicted for either.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import artefact
from bench.emulated_nodes import BURST, CWND, PACKET_BYTES, QUEUE, WINDOW, TwoNodes, why_not
from bench.training_layers import study
from bench.training_rank import ROUNDS, SCHEDULED, SHAPE
from monde.training.auto import CONFIRM_ROUNDS, TRIAL_ROUNDS

LINKS_MBIT = (0.0, 200.0, 400.0, 1000.0)  # 0: as fast as the kernel is


def run_nodes(mbit: list[float], per_node: int, peers: bool) -> dict[str, Any]:
    """What the first rank wrote, by link."""
    with tempfile.TemporaryDirectory() as folder, TwoNodes() as nodes:
        out = Path(folder) / "result.json"
        speeds = [f"{speed:g}" for speed in mbit]
        arguments = ["--mbit", *speeds, "--out", str(out), *(["--peers"] if peers else [])]
        nodes.run("bench.training_rank", per_node, arguments, deadline_s=120.0 * (1 + len(mbit)))
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def describe(mbit: str, found: dict[str, Any]) -> None:
    """Medians of a step, and the simulator's errors: unscheduled forward, backward, scheduled forward, backward."""
    print(f"{mbit if float(mbit) else 'unshaped'} Mbit/s")
    for name, samples in found["step_s"].items():
        print(f"  {name}: {1e3 * statistics.median(samples):.0f} ms")
    for where, layer in found["layers"].items():
        chunks = layer["degrees"][SCHEDULED]
        errors = ", ".join(f"{p['predicted_s'] / p['measured_s'] - 1:+.0%}" for p in layer["predictions"])
        gain = found["gain"][where]
        print(
            f"  {where}: chunks {chunks['forward']}/{chunks['backward']}, gain within rounds {gain['median']:.2f} "
            f"({gain['low']:.2f} to {gain['high']:.2f}), simulator off by {errors}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("layers").add_argument("--out", type=Path)
    nodes = commands.add_parser("nodes")
    nodes.add_argument("--mbit", type=float, nargs="+", default=LINKS_MBIT)
    nodes.add_argument("--per-node", type=int, default=2, help="ranks of a node")
    nodes.add_argument("--peers", action="store_true", help="DeepSpeed-MoE too, which must be installed")
    nodes.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "layers":
        artefact.write(
            "training-layers",
            {"assumptions": sys.modules["bench.training_layers"].__doc__},
            study(),
            arguments.out,
        )
        return
    if (reason := why_not()) is not None:
        parser.error(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces go
    configuration = SHAPE | {
        "rounds": ROUNDS,
        "trial_rounds": TRIAL_ROUNDS,
        "confirm_rounds": CONFIRM_ROUNDS,
        "nodes": 2,
        "ranks_per_node": arguments.per_node,
        "tcp_window": WINDOW,
        "initial_window": CWND,
        "queue": QUEUE,
        "burst": BURST,
        "packet_bytes": PACKET_BYTES,
    }
    results = run_nodes(arguments.mbit, arguments.per_node, arguments.peers)
    for mbit, found in results.items():
        describe(mbit, found)
    artefact.write("training-nodes", configuration, results, arguments.out)


if __name__ == "__main__":
    main()
