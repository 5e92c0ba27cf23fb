"""Ways to exchange rows between two emulated nodes: measured at sizes x link speeds x ranks, next to what was predicted.

sudo python -m bench.network [--short] [--tp 2 4] [--mbit 100 400] [--kib 64 4096] [--out FILE] [--add-to FILE]

Ways are timed in turn, those near the soonest more often, and the slowest rank counts. Needs root and iproute2; nothing
else should run. --add-to joins the cases of another artefact, so that a sweep can be made in pieces.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench import artefact
from bench.emulated_nodes import BURST, CWND, PACKET_BYTES, QUEUE, WINDOW, TwoNodes, why_not
from bench.rounds import paired

WITHIN = 1.05


def measure(
    ranks_per_node: int, mbit: float, kib: list[int], rounds: int, more_s: float, deadline_s: float = 900.0
) -> list[dict[str, Any]]:
    """The cases of one link; see bench/network_rank.py for what each holds."""
    with tempfile.TemporaryDirectory() as folder, TwoNodes() as nodes:
        out = Path(folder) / "cases.json"
        sizes = [str(k) for k in kib]
        arguments = ["--mbit", str(mbit), "--kib", *sizes, "--rounds", str(rounds)]
        arguments += ["--more-s", str(more_s), "--out", str(out)]
        nodes.run("bench.network_rank", ranks_per_node, arguments, deadline_s)
        found = json.loads(out.read_text())
        assert isinstance(found, list)
        return found


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians: what was chosen against the best, and against the redundant exchange. loss 0.02: 2% above the best.
    by_profile: what would have been chosen before the exchange tried the ways near the soonest with its own rows.

    within_rounds: chosen over best by rounds, see bench.rounds.paired. is_surely_worse: that its median is above 1.05 by
    its whole interval; a loss of more with a lower end below is one that this sweep cannot tell from noise.
    """
    rows = []
    for case in cases:
        median_s = {way: median(samples) for way, samples in case["samples_s"].items()}
        best = min(median_s, key=lambda way: median_s[way])
        chosen = case["chosen"]
        both = zip(case["samples_s"][chosen], case["samples_s"][best], strict=False)
        within_rounds = paired(*zip(*both, strict=True))
        rows.append(
            {
                **{key: case[key] for key in ("ranks_per_node", "mbit_per_s", "exchange", "away_bytes")},
                "chosen": chosen,
                "chosen_by_profile": case["chosen_by_profile"],
                "best": best,
                "loss": round(median_s[chosen] / median_s[best] - 1, 4),
                "loss_by_profile": round(median_s[case["chosen_by_profile"]] / median_s[best] - 1, 4),
                "within_rounds": {name: round(ratio, 3) for name, ratio in within_rounds.items()},
                "is_surely_worse": chosen != best and within_rounds["low"] > WITHIN,
                "speedup_over_redundant": round(median_s["redundant"] / median_s[chosen], 3),
                "predicted_over_measured": round(case["predicted_s"][chosen] / median_s[chosen], 3),
                "shaped_link_busy": round(link_s(case) / median_s[chosen], 3),
            }
        )

    def share_within(loss: str) -> float:
        return sum(row[loss] <= WITHIN - 1 for row in rows) / max(len(rows), 1)

    return {
        "num_cases": len(rows),
        "share_within_5_percent": share_within("loss"),
        "share_within_5_percent_by_profile": share_within("loss_by_profile"),
        "num_surely_worse": sum(row["is_surely_worse"] for row in rows),
        "cases": rows,
    }


def link_s(case: dict[str, Any]) -> float:
    """The least that the shaped link takes: each row leaves once. 0 where it is not shaped."""
    rate = case["mbit_per_s"] * 1e6 / 8
    return case["away_bytes"] / rate if rate else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4], help="ranks of a node")
    parser.add_argument(
        "--mbit", type=float, nargs="+", default=[100, 400, 1600], help="link speeds; 0: not shaped"
    )
    parser.add_argument(
        "--kib", type=int, nargs="+", default=[64, 512, 4096], help="rows a rank has for the other node"
    )
    parser.add_argument("--more-s", type=float, default=6.0, help="seconds of those, at least")
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="of all ways of a case, and twice as many of the ways near the soonest",
    )
    parser.add_argument("--short", action="store_true", help="one case, about a quarter of a minute")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add-to", type=Path)
    args = parser.parse_args()
    if (reason := why_not()) is not None:
        parser.error(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces go
    if args.short:
        args.tp, args.mbit, args.kib, args.rounds, args.more_s = [2], [200], [2048], 3, 1.0
    cases = json.loads(args.add_to.read_text())["results"]["cases"] if args.add_to else []
    for tp in args.tp:
        for mbit in args.mbit:
            new = measure(tp, mbit, args.kib, args.rounds, args.more_s)
            cases += new
            for row in summary(new)["cases"]:
                print(row)
    told = summary(cases)
    print(
        f"chosen within 5% of the best: {told['share_within_5_percent']:.0%} of {told['num_cases']} cases; "
        f"surely worse: {told['num_surely_worse']}"
    )
    configuration = {
        "tcp_window": WINDOW,
        "initial_window": CWND,
        "queue": QUEUE,
        "burst": BURST,
        "packet_bytes": PACKET_BYTES,
    }
    where = artefact.write(
        "network", configuration, {"summary": told, "cases": cases}, args.out or args.add_to
    )
    print(where)


if __name__ == "__main__":
    main()
