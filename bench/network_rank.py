"""One rank of bench/network.py: for every link speed, measure the mesh, then time every way at every size.

Rank 0 writes what all agree on: seconds of the slowest rank, every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.emulated_nodes import shape_link
from monde.calibration.network import NetworkEffort, measure_network
from monde.device.mesh import open_mesh
from monde.planning.exchange import REPLICATED, Strategy, exchanges
from monde.training.dispatch import NodeExchange, Way
from monde.training.turns import Effort, in_turn

ROW_FLOATS = 256
WAYS = [Way(strategy, chunks) for strategy, chunks in REPLICATED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbit", type=float, nargs="+", required=True)
    parser.add_argument(
        "--kib", type=int, nargs="+", required=True, help="rows that a rank holds for other nodes"
    )
    parser.add_argument("--more-s", type=float, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = open_mesh(2, int(os.environ["LOCAL_WORLD_SIZE"]), timeout_s=60.0)
    results = [case for mbit in args.mbit for case in link(mesh, mbit, args)]
    if dist.get_rank() == 0:
        args.out.write_text(json.dumps(results))
    dist.destroy_process_group()


def link(mesh: Any, mbit: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All sizes at one link speed, with the profile measured at it."""
    if mesh.get_local_rank("local") == 0:
        shape_link(os.environ["GLOO_SOCKET_IFNAME"], mbit)
    dist.barrier()
    begin_s = time.perf_counter()
    network = measure_network(mesh, NetworkEffort(num_samples=5, longest_s=0.15))
    calibrated_s = time.perf_counter() - begin_s
    by_way = [NodeExchange(mesh, way) for way in WAYS]
    chooser = NodeExchange(mesh, network)
    cases = []
    for kib in args.kib:
        rows = kib * 1024 // (4 * ROW_FLOATS)
        node = mesh.get_local_rank("node")
        counts = [rows if i != node else 0 for i in range(2)]
        routes = chooser.routes(counts)
        x_RD = torch.randn(rows, ROW_FLOATS, generator=torch.Generator().manual_seed(node))
        for adds, what in ((False, "dispatch"), (True, "combine")):
            expected = by_way[0].run(x_RD, routes, adds)
            for exchange in by_way[1:]:
                assert torch.equal(exchange.run(x_RD, routes, adds), expected), "ways differ"
            steps = [partial(e.run, x_RD, routes, adds) for e in by_way]
            row_bytes = 4 * ROW_FLOATS
            by_profile = chooser.way_of(routes, row_bytes, adds)
            begin_s = time.perf_counter()
            assert torch.equal(chooser.run(x_RD, routes, adds), expected), "ways differ"  # tries ways first
            tried_s = time.perf_counter() - begin_s
            samples = in_turn(steps, torch.device("cpu"), Effort(args.rounds, 2 * args.rounds, args.more_s))
            planned = exchanges(network, rows * row_bytes, rows * row_bytes, adds)
            cases.append(
                {
                    "ranks_per_node": int(os.environ["LOCAL_WORLD_SIZE"]),
                    "mbit_per_s": mbit,
                    "exchange": what,
                    "away_bytes": rows * row_bytes,
                    "chosen_by_profile": name(by_profile),
                    "tried_s": tried_s,
                    "chosen": name(chooser.way_of(routes, row_bytes, adds)),
                    "predicted_s": {name(Way(e.strategy, e.chunks)): e.seconds_s for e in planned},
                    "samples_s": {
                        name(way): [float(f"{one:.4g}") for one in seconds]
                        for way, seconds in zip(WAYS, samples, strict=True)
                    },
                    "network": asdict(network),
                    "calibration_s": calibrated_s,
                }
            )
    return cases


def name(way: Way) -> str:
    return f"{way.strategy} {way.chunks}" if way.strategy is Strategy.PIPELINED else str(way.strategy)


if __name__ == "__main__":
    main()
