"""Decode of a whole mixture-of-experts model: monde next to others, next to the bound.

    python -m bench.decode                                    Qwen3-30B-A3B's dimensions, everything
    python -m bench.decode --contenders monde --budgets 16GiB --contexts 512
    python -m bench.decode --toy --device cpu                 the same code on a small model

Weights are random, dimensions true; routing is transformers' own, made as popular as asked for (bench.decode.skew).
A row is milliseconds of a decode step of B sequences over a full cache; the tokens of every step reach the host.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any

import torch

from bench import artefact
from bench.decode import report
from bench.decode.bound import Row, targets
from bench.decode.options import parse
from bench.decode.run import Run
from bench.decode.skew import busiest_quarter


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows: list[Row] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        run = Run(options)
        configuration = dataclasses.asdict(options) | {
            "out": None,
            "device": str(options.device),
            "shape": dataclasses.asdict(run.shape),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "peers": [peer.name for peer in options.peers],
        }
        with artefact.kept("decode", configuration, lambda: _results(run, rows, caught), options.out):
            print(report.head())
            for row in run.rows():
                rows.append(row)
                print(report.line(row), flush=True)


def _results(run: Run, rows: list[Row], caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    found = targets(rows, run.ceilings.own_round_trip_s)
    for target in found:
        print(report.target_line(target))
    return {
        "ceilings": dataclasses.asdict(run.ceilings),
        "busiest_quarter": {name: busiest_quarter(p_LE) for name, p_LE in run.p_LE.items()},
        "rows": [dataclasses.asdict(row) for row in rows],
        "targets": [dataclasses.asdict(target) | {"met": target.met} for target in found],
        "warnings": sorted({str(one.message) for one in caught if issubclass(one.category, RuntimeWarning)}),
    }


if __name__ == "__main__":
    main()
