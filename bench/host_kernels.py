"""Host kernels against the ceilings of the machine and against other projects.

Three parts, every contender of a row timed in turn (bench.rounds), correctness checked before:
    decode    1, 2, 4 tokens per expert: weight bytes per second as a share of a plain read test
    prefill   16 .. 512 tokens per expert: operations per second as a share of a multiply-add peak in L1
    peers     2048x768, 128 experts, top-8, two layers, random routing: milliseconds per layer
Ours are timed where native callers call them, as the peers' harnesses time theirs; the row "from Python" has the call
of `ExpertBank.forward` in it as well. The bound of a row is max(weight bytes / read bandwidth, operations / peak). The read test goes through all of the
experts' memory, in turn with the contenders. Letters as in bench.host_layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hostcompute
from bench import artefact, host_layers, peers
from bench.rounds import Measure, Summary, interleave, ratio, repeated
from hostcompute import ExpertSpec
from hostcompute.backends.select import choose
from hostcompute.probe import read_bandwidth_of

SHAPES = (ExpertSpec(128, 2048, 768), ExpertSpec(4, 4096, 14336))  # 1.2 and 1.4 GB: no cache holds them
PEER_SPEC, PEER_TOP_K = ExpertSpec(128, 2048, 768), 8
PARTS = ("decode", "prefill", "peers")
COLUMNS = ("ms", "p10", "p90", "bound", "GB/s", "of read", "GFLOP/s", "of peak", "ours x")


@dataclass(frozen=True)
class Options:
    num_threads: int
    isas: tuple[str, ...]
    num_rounds: int
    round_s: float
    quick: bool
    peers: tuple[peers.Peer, ...]


@dataclass(frozen=True)
class Work:
    """What one step has to do, whoever does it."""

    weight_bytes: float
    flops: float

    def bound_s(self, read_bytes_per_s: float, peak_flops_per_s: float) -> float:
        return max(self.weight_bytes / read_bytes_per_s, self.flops / peak_flops_per_s)


@dataclass(frozen=True)
class Row:
    """One contender in one case, and the ceilings measured around this very case."""

    part: str
    case: str
    contender: str
    step: Summary
    bound_s: float
    bytes_per_s: float
    flops_per_s: float
    read_bytes_per_s: float
    peak_flops_per_s: float
    ours_is_faster: (
        float | None
    )  # of other contenders: their time over that of our first one, paired by round


def main() -> None:
    arguments = parse_arguments()
    threads = arguments.threads or hostcompute.shared_pool().num_threads
    options = Options(
        num_threads=threads,
        isas=tuple(arguments.isa.split(",")) if arguments.isa else (choose("native").isa,),
        num_rounds=arguments.rounds or (3 if arguments.quick else 5),
        round_s=0.4 if arguments.quick else 1.5,
        quick=arguments.quick,
        peers=asked_peers(arguments),
    )
    rows: list[Row] = []
    configuration = dataclasses.asdict(options)
    with artefact.kept(
        "host_kernels", configuration, lambda: [dataclasses.asdict(row) for row in rows], arguments.out
    ):
        if "decode" in arguments.only or "prefill" in arguments.only:
            for spec in SHAPES:
                rows += run_shape(spec, arguments.only, options)
                gc.collect()
        if "peers" in arguments.only:
            rows += run_peers(options)


def run_shape(spec: ExpertSpec, parts: Sequence[str], options: Options) -> Iterator[Row]:
    """Decode and prefill on one layer, the active experts rotating through all of it."""
    layer = host_layers.make_layer(spec, seed=0)
    banks = our_banks([layer], options)
    reader = Reader(banks[options.isas[0]], options.num_threads)
    num_active = min(8, spec.num_experts // 4)
    tokens = {
        "decode": (1, 2, 4),
        "prefill": (16, 128, 512) if options.quick else (16, 32, 64, 128, 256, 512),
    }
    for part in parts:
        for num_tokens in tokens.get(part, ()):
            routings = host_layers.rotating(spec, num_active, num_tokens)
            x_TD = torch.randn(num_tokens, spec.d_model).bfloat16()
            measures = our_measures(banks, x_TD, routings)
            measures["torch"] = repeated(host_layers.torch_step([layer], x_TD, routings, options.num_threads))
            case = f"{spec.d_model}x{spec.d_ffn}, {num_active} experts, {num_tokens} tokens each"
            yield from run_case(part, case, measures, reader, work_of(spec, routings), options)
    for of in banks.values():
        of[0].close()


def run_peers(options: Options) -> Iterator[Row]:
    """The layer shape that every peer was measured with."""
    layers = [host_layers.make_layer(PEER_SPEC, seed) for seed in range(2)]
    banks = our_banks(layers, options)
    reader = Reader(banks[options.isas[0]], options.num_threads)
    for batch in (1, 16, 128) if options.quick else (1, 4, 16, 128):
        routings = host_layers.random_routings(PEER_SPEC, PEER_TOP_K, batch, num_routings=64)
        x_TD = torch.randn(batch, PEER_SPEC.d_model).bfloat16()
        measures = our_measures(banks, x_TD, routings)
        measures["torch"] = repeated(host_layers.torch_step(layers, x_TD, routings, options.num_threads))
        measures |= {peer.name: peer.measure(batch, options.num_threads) for peer in options.peers}
        yield from run_case(
            "peers", f"batch {batch}", measures, reader, work_of(PEER_SPEC, routings), options
        )


def our_banks(
    layers: Sequence[host_layers.Layer], options: Options
) -> dict[str, list[hostcompute.ExpertBank]]:
    """Banks by contender name, checked against the oracle."""
    banks: dict[str, list[hostcompute.ExpertBank]] = {}
    for name, backend, isa in [(isa, "native", isa) for isa in options.isas] + [("numba", "numba", None)]:
        banks[name] = [host_layers.make_bank(layer, backend, isa, options.num_threads) for layer in layers]
        error = host_layers.check(banks[name][0], layers[0])
        print(f"{name}: relative error {error:.2g} against the oracle")
    return banks


def our_measures(
    banks: dict[str, list[hostcompute.ExpertBank]],
    x_TD: torch.Tensor,
    routings: Sequence[host_layers.Routing],
) -> dict[str, Measure]:
    steps = {name: host_layers.bank_step(of, x_TD, routings) for name, of in banks.items()}
    natives = {name: of for name, of in banks.items() if of[0].choice.name == "native"}
    measures = {name: host_layers.native_measure(of, x_TD, routings) for name, of in natives.items()}
    measures["from Python"] = repeated(steps[next(iter(natives))])
    return measures | {name: repeated(step) for name, step in steps.items() if name not in natives}


def work_of(spec: ExpertSpec, routings: Sequence[host_layers.Routing]) -> Work:
    """Mean work of a step: every expert that is touched is read once."""
    num_experts = statistics.mean(len(np.unique(ids)) for ids in routings)
    flops_per_pair = 2 * spec.num_matrices * spec.d_model * spec.d_ffn
    return Work(num_experts * spec.expert_bytes, routings[0].size * flops_per_pair)


def run_case(
    part: str,
    case: str,
    measures: dict[str, Callable[[float], list[float]]],
    reader: Reader,
    work: Work,
    options: Options,
) -> list[Row]:
    """Time the contenders and the read test in turn, arithmetic before and after, and print the rows."""
    peaks = [measure_peaks(options)]
    summaries = interleave(measures | {"": reader.measure}, options.num_rounds, options.round_s)
    peaks.append(measure_peaks(options))
    read_bytes_per_s = reader.num_bytes / summaries.pop("").median_s
    ours = next(iter(summaries.values()))
    rows = []
    print(f"\n{part}: {case}; read test {read_bytes_per_s / 1e9:.1f} GB/s")
    print(" " * 16 + "".join(f"{title:>9}" for title in COLUMNS))
    for name, summary in summaries.items():
        isa = name if name in options.isas else options.isas[0]
        peak = statistics.mean(one[isa] for one in peaks)
        row = Row(
            part,
            case,
            name,
            summary,
            work.bound_s(read_bytes_per_s, peak),
            work.weight_bytes / summary.median_s,
            work.flops / summary.median_s,
            read_bytes_per_s,
            peak,
            None if summary is ours else ratio(summary, ours),
        )
        print(describe(row), flush=True)
        rows.append(row)
    return rows


def describe(row: Row) -> str:
    cells = [f"{s * 1e3:.3f}" for s in (row.step.median_s, row.step.p10_s, row.step.p90_s, row.bound_s)]
    cells += [f"{row.bytes_per_s / 1e9:.1f}", f"{row.bytes_per_s / row.read_bytes_per_s:.1%}"]
    cells += [f"{row.flops_per_s / 1e9:.0f}", f"{row.flops_per_s / row.peak_flops_per_s:.1%}"]
    cells += ["" if row.ours_is_faster is None else f"{row.ours_is_faster:.2f}"]
    return f"  {row.contender:14}" + "".join(f"{cell:>9}" for cell in cells)


class Reader:
    """The read test: the memory of all experts once through, by the plainest loop there is."""

    def __init__(self, banks: Sequence[hostcompute.ExpertBank], num_threads: int) -> None:
        self._ranges = [bank.backend.memory_range for bank in banks]  # type: ignore[attr-defined]
        self._pool = hostcompute.make_pool(num_threads)
        self.num_bytes = sum(num_bytes for _, num_bytes in self._ranges)
        self.measure = repeated(self._step)

    def _step(self, _: int) -> None:
        for address, num_bytes in self._ranges:
            read_bandwidth_of(address, num_bytes, self._pool, repeats=1)


def measure_peaks(options: Options) -> dict[str, float]:
    """Operations per second of each ISA that runs."""
    return {isa: hostcompute.compute_peak(isa, options.num_threads) for isa in options.isas}


def asked_peers(arguments: argparse.Namespace) -> tuple[peers.Peer, ...]:
    found = [peers.ggml(argument) for argument in arguments.peer_ggml]
    if arguments.peer_kt:
        found.append(peers.kt_kernel(arguments.peer_kt))
    if arguments.peer_freetoken:
        found.append(peers.freetoken(arguments.peer_freetoken))
    return tuple(found)


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", default=PARTS, type=parts, help="comma-separated parts of decode,prefill,peers"
    )
    parser.add_argument("--threads", type=int, help="threads of every contender (default: all cores)")
    parser.add_argument("--isa", help="comma-separated ISAs of the native backend (default: the best)")
    parser.add_argument("--rounds", type=int, help="rounds of the round-robin (default: 5, quick 3)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, fewer cases")
    parser.add_argument("--out", type=Path, help="where the artefact goes (default: bench/results/)")
    parser.add_argument(
        "--peer-ggml",
        action="append",
        default=[],
        metavar="NAME[:TYPE]=PATH",
        help="a ggml harness; see bench/peers.py",
    )
    parser.add_argument("--peer-kt", metavar="FOLDER", help="folder with kt_kernel in it")
    parser.add_argument(
        "--peer-freetoken", metavar="SO", help="FreeToken's _cpu_moe extension for this Python"
    )
    return parser.parse_args()


def parts(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    unknown = set(chosen) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}"
        )
    return chosen


if __name__ == "__main__":
    main()
