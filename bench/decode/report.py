"""Rows and targets as text; several artefacts of one machine as one.

python -m bench.decode.report ARTEFACT...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.decode.bound import Row, Target, targets

_HEAD = (
    "contender",
    "budget",
    "skew",
    "batch",
    "context",
    "ms",
    "tokens/s",
    "bound ms",
    "of bound",
    "hits",
    "layers",
)


def line(row: Row) -> str:
    where = f"| {row.contender} | {row.budget} | {row.skew} | {row.batch} | {row.context} |"
    if row.skipped:
        return f"{where} left out: {row.skipped} | | | | | |"
    hits = row.figures.get("hit_rate", row.figures.get("expert_hit_rate"))
    return (
        f"{where} {row.median_s * 1e3:.2f} | {row.tokens_per_s:.1f} | {row.bound_s * 1e3:.2f} | {row.of_bound:.0%} "
        f"| {'' if hits is None else f'{hits:.0%}'} | {row.measured_layers} |"
    )


def head() -> str:
    return f"| {' | '.join(_HEAD)} |\n{'|---' * len(_HEAD)}|"


def target_line(target: Target) -> str:
    if target.got is None:
        return f"not measured  {target.what} (>= {target.wanted:g})"
    verdict = "met" if target.met else "MISSED"
    return f"{verdict:12}  {target.what}: {target.got:.2f} (>= {target.wanted:g}) {target.worst}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("artefacts", nargs="+", type=Path)
    records = [json.loads(path.read_text()) for path in parser.parse_args().artefacts]
    gpus = {record["configuration"]["gpu"] for record in records}
    models = {record["configuration"]["shape"]["name"] for record in records}
    if len(gpus) > 1 or len(models) > 1:
        parser.error(f"the artefacts are of different machines or models: {sorted(gpus)}, {sorted(models)}")
    rows = [Row(**row) for record in records for row in record["results"]["rows"]]
    print(head())
    for row in rows:
        print(line(row))
    tops = [record["results"]["ceilings"] for record in records]
    # What a whole empty layer takes; artefacts that have one number for both have that of their time.
    round_trips = [top.get("own_round_trip_s", top["round_trip_s"]) for top in tops]
    for target in targets(rows, max(round_trips)):
        print(target_line(target))


if __name__ == "__main__":
    main()
