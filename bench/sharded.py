"""MoEShard's evaluation: slices of every expert, whole experts without drops, DeepSpeed's padded buffers, and the planner.

    python -m bench.sharded simulated [--out FILE]                  whole encoders on the paper's testbed, by the simulator
    python -m bench.sharded ranks --num-ranks 2 --experts 8 64 ...  one layer on Gloo ranks of this machine

A file given to `ranks` keeps the cases of earlier runs of the same commit that this one does not measure again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import artefact, sharded_ranks, sharded_simulated, sharded_study
from bench.moeshard import EXPERTS


def kept(out: Path | None, num_ranks: int, experts: list[int]) -> list[dict[str, Any]]:
    """Cases of an earlier run on this commit that this run leaves alone."""
    if out is None or not out.exists():
        return []
    before = json.loads(out.read_text())
    if before["commit"] != artefact.commit():
        raise ValueError(f"{out.name}: of another commit; remove it or name another file with --out")
    return [
        case
        for case in before["results"]
        if case["num_ranks"] != num_ranks or case["num_experts"] not in experts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("simulated").add_argument("--out", type=Path)
    ranks = commands.add_parser("ranks")
    ranks.add_argument("--num-ranks", type=int, default=2)
    ranks.add_argument("--experts", type=int, nargs="+", default=list(EXPERTS))
    ranks.add_argument("--tokens", type=int, nargs="+", default=[16, 128, 1024], help="of every rank")
    ranks.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "simulated":
        found = sharded_study.study()
        print(sharded_study.tables(found))
        artefact.write("sharded_simulated", {"assumptions": sharded_simulated.__doc__}, found, arguments.out)
        return
    before = kept(arguments.out, arguments.num_ranks, arguments.experts)
    cases = sharded_ranks.measure(arguments.num_ranks, arguments.experts, arguments.tokens)
    configuration = sharded_ranks.configuration()
    artefact.write("sharded_ranks", configuration, before + cases, arguments.out)
    print(sharded_ranks.table(before + cases))


if __name__ == "__main__":
    main()
