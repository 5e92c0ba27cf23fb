"""MoNDE's own experiment on this machine: its models' true dimensions, monde against on-demand parameter offloading.

    python -m bench.monde_hardware                          as many layers as `--layers` says, everything
    python -m bench.monde_hardware --toy --device cpu       the same code on a small model

A pass of `num_layers` layers with experts and the dense blocks between them: the encoder over batch x 512 tokens, or
one step of the decoder over batch tokens. Experts are ungated, routing is skewed as in bench.monde_paper. Contenders
have the same pinned host memory and the same number of experts on the GPU: none, or a quarter of each layer's.

    bound = dense part (measured) + max(bytes of active experts that are not on the GPU / what host reads and copies
            move together, bytes of those that are / HBM bandwidth) + a hand-over a layer
    physics = time of on-demand offloading / bound: the most that any speed-up could be here
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import artefact
from bench.contenders.base import free_memory
from bench.contenders.lru import MIN_SLOTS
from bench.decode import ceilings
from bench.decode.bound import Ceilings
from bench.decode.shapes import Shape
from bench.monde_paper import MODELS, Model, Workload
from bench.monde_passes import Experts, Monde, Nothing, OnDemand, Pass, host_layers

TOY = Model("toy", 64, 128, 16, 2, 4, 2)
WANTED = {"encoder": 7.5, "decoder": 3.7}  # the paper's simulated headline
NEAR_BOUND = 0.85


@dataclass(frozen=True)
class Row:
    """One contender in one case; times are of a pass."""

    model: str
    part: str
    batch: int
    num_layers: int
    contender: str
    num_resident: int
    median_s: float
    samples_s: list[float]
    dense_s: float
    bound_s: float
    cold_bytes: float
    resident_bytes: float


def measure(
    model: Model,
    num_layers: int,
    workloads: list[Workload],
    num_passes: int,
    top: Ceilings,
    device: torch.device,
    memory: ceilings.HostMemory | None,
) -> Iterator[Row]:
    passes = [Pass(model, workload, num_layers, device) for workload in workloads]
    dense_s = {p.workload: statistics.median(p.samples_s(Nothing(), num_passes)) for p in passes}

    def rows_of(experts: Experts, num_resident: int) -> Iterator[Row]:
        for one in passes:
            before = top if memory is None else ceilings.with_reads(top, memory.reads())
            samples = one.samples_s(experts, num_passes)
            after = top if memory is None else ceilings.with_reads(top, memory.reads())
            cold_bytes_per_s = statistics.mean((before.cold_bytes_per_s, after.cold_bytes_per_s))
            row = _row(one, experts.name, num_resident, samples, dense_s[one.workload], top, cold_bytes_per_s)
            print(line(row), flush=True)
            yield row

    quarter = model.num_experts // 4
    host = host_layers(model, num_layers, device)
    for num_resident, num_slots in ((0, MIN_SLOTS), (quarter, quarter)):
        yield from rows_of(OnDemand(host, num_slots, device), num_resident)
        free_memory()
    del host
    free_memory()
    num_tokens = max(workload.num_tokens for workload in workloads)
    for num_resident in (0, quarter):
        experts = Monde(model, num_layers, num_resident, num_tokens, device)
        yield from rows_of(experts, num_resident)
        experts.close()
        del experts
        free_memory()


def _row(
    one: Pass,
    name: str,
    num_resident: int,
    samples: list[float],
    dense_s: float,
    top: Ceilings,
    cold_bytes_per_s: float,
) -> Row:
    """cold_bytes_per_s: when the samples were taken."""
    cold, resident = one.bytes_moved(num_resident)
    read_s = max(cold / cold_bytes_per_s, resident / top.hbm_read_bytes_per_s)
    bound_s = dense_s + read_s + one.num_layers * top.round_trip_s
    return Row(
        one.model.name,
        one.workload.part,
        one.workload.batch,
        one.num_layers,
        name,
        num_resident,
        statistics.median(samples),
        samples,
        dense_s,
        bound_s,
        cold,
        resident,
    )


def line(row: Row) -> str:
    return (
        f"| {row.model} | {row.part} | {row.batch} | {row.contender} | {row.num_resident} | {row.median_s * 1e3:.2f} "
        f"| {row.dense_s * 1e3:.2f} | {row.bound_s * 1e3:.2f} | {row.bound_s / row.median_s:.0%} |"
    )


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    """Per case: monde's speed-up over plain on-demand offloading, the most that could be, and which target is met."""
    found = []
    baselines = {(r.model, r.part, r.batch): r for r in rows if r.contender == "on demand"}
    for row in rows:
        if row.contender != "monde":
            continue
        baseline = baselines[row.model, row.part, row.batch]
        speed_up, physics = baseline.median_s / row.median_s, baseline.median_s / row.bound_s
        met = speed_up >= WANTED[row.part] or row.bound_s / row.median_s >= NEAR_BOUND
        found.append(
            {
                "case": f"{row.model}, {row.part}, batch {row.batch}, {row.num_resident} resident",
                "speed_up": speed_up,
                "wanted": WANTED[row.part],
                "physics": physics,
                "of_bound": row.bound_s / row.median_s,
                "met": met,
            }
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.monde_hardware", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--models", default="Switch-Large-128,NLLB-MoE-54B", help="comma-separated (default both)"
    )
    parser.add_argument(
        "--layers", default="4,2", help="layers with experts of each (default 4,2: 9 and 17 GB)"
    )
    parser.add_argument("--parts", default="encoder,decoder")
    parser.add_argument("--batches", default="1,4,16", help="sequences (default 1,4,16)")
    parser.add_argument("--passes", type=int, default=20, help="timed passes of a case (default 20)")
    parser.add_argument("--toy", action="store_true", help="a small model, for machines without a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where the artefact goes (default: bench/results/)")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.toy:
        parser.error("--device cpu: the true dimensions are for a GPU; add --toy")
    device = torch.device("cuda", 0) if args.device.startswith("cuda") else torch.device(args.device)
    known = {model.name: model for model in MODELS}
    names, layers = ([TOY.name], "2") if args.toy else (args.models.split(","), args.layers)
    counts = [int(count) for count in layers.split(",")]
    if unknown := [name for name in names if name not in known and name != TOY.name]:
        parser.error(f"--models: expected any of {', '.join(known)}, got {', '.join(unknown)}")
    if len(counts) != len(names):
        parser.error(f"--layers: expected one number for each of {len(names)} models, got {args.layers}")
    sequence = 16 if args.toy else 512
    workloads = [
        Workload(part, int(batch), sequence=sequence)
        for part in args.parts.split(",")
        for batch in args.batches.split(",")
    ]
    rows: list[Row] = []
    tops: dict[str, Any] = {}
    print("| model | part | batch | experts by | resident | ms | dense | bound | of it |\n|" + "---|" * 9)
    configuration = {k: v for k, v in vars(args).items() if k != "out"}
    configuration["gpu"] = torch.cuda.get_device_name() if device.type == "cuda" else None
    with artefact.kept("monde_hardware", configuration, lambda: _results(tops, rows), args.out):
        for name, num_layers in zip(names, counts, strict=True):
            model = TOY if args.toy else known[name]
            shape = Shape(
                name, num_layers, num_layers, model.num_experts, model.num_topk, model.d_model, model.d_ffn
            )
            memory = ceilings.HostMemory.of_a_layer(device) if device.type == "cuda" else None
            top = ceilings.measure(shape, memory)
            tops[name] = dataclasses.asdict(top)
            rows += measure(model, num_layers, workloads, args.passes, top, device, memory)
            del memory


def _results(tops: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    found = verdicts(rows)
    for verdict in found:
        told = "met   " if verdict["met"] else "MISSED"
        print(
            f"{told} {verdict['case']}: {verdict['speed_up']:.2f}x of {verdict['wanted']}x wanted, at most "
            f"{verdict['physics']:.2f}x here; {verdict['of_bound']:.0%} of the bound"
        )
    return {"ceilings": tops, "rows": [dataclasses.asdict(row) for row in rows], "verdicts": found}


if __name__ == "__main__":
    main()
