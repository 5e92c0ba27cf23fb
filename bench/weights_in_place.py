"""Weights used in place from a mapped checkpoint, or packed once into a huge-page arena?

Writes row-major bf16 experts to a file, as a checkpoint has them, and compares on the very same experts:
    in place   the mapping itself (page cache, 4 KiB pages, row-major): the native kernel of dense layers for up to four
               tokens, two products an expert called from Python; numba; and a read test of it
    packed     the native backend's arena (huge pages, panels): native backend, and a read test of such pages
One product of the dense kernel over the whole mapping says what no call from Python slows down.
Loading is timed from a warm page cache: the price that packing pays once. Letters as in bench.host_layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import mmap
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import hostcompute
from bench import artefact, host_layers
from bench.rounds import Summary, interleave, ratio, repeated
from hostcompute import ExpertBank, ExpertSpec, make_pool
from hostcompute.arrays import HostArray
from hostcompute.dense import DenseKernel
from hostcompute.probe import read_bandwidth_of

TOKENS = (1, 4, 64)


@dataclass(frozen=True)
class Loaded:
    """A bank and what it took to fill it."""

    bank: ExpertBank
    load_s: float


@dataclass(frozen=True)
class Reads:
    """Plain read tests, bytes per second."""

    mapped_bytes_per_s: float
    huge_page_bytes_per_s: float


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.weights_in_place", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--threads", type=int, help="threads of both (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument(
        "--folder", type=Path, help="where the file of experts goes (default: the temporary folder)"
    )
    parser.add_argument("--out", type=Path, help="where the artefact goes (default: bench/results/)")
    arguments = parser.parse_args()
    spec = ExpertSpec(128, 2048, 768)
    num_rounds, round_s = (3, 0.4) if arguments.quick else (7, 1.5)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        mapped = write_and_map(spec, Path(folder) / "experts.bin")
        in_place, packed = (load(mapped, spec, backend, arguments.threads) for backend in ("numba", "native"))
        dense = InPlace(mapped, spec, arguments.threads)
        reads = [read_tests(mapped, arguments.threads)]
        whole_bytes_per_s = [dense.whole_bytes_per_s()]
        steps = {}
        for num_tokens in TOKENS:
            steps[num_tokens] = time_steps(
                spec, in_place.bank, packed.bank, dense, num_tokens, num_rounds, round_s
            )
            reads.append(read_tests(mapped, arguments.threads))
            whole_bytes_per_s.append(dense.whole_bytes_per_s())
        for loaded in (in_place, packed):
            loaded.bank.close()
        del mapped, dense
    report(spec, in_place, packed, reads, whole_bytes_per_s, steps)
    results = {
        "load_s": {"in place": in_place.load_s, "packed": packed.load_s},
        "dense_kernel_over_everything_bytes_per_s": whole_bytes_per_s,
        "reads": [dataclasses.asdict(one) for one in reads],
        "steps": {
            tokens: {name: dataclasses.asdict(s) for name, s in both.items()}
            for tokens, both in steps.items()
        },
    }
    configuration = {
        "spec": dataclasses.asdict(spec),
        "num_threads": arguments.threads,
        "num_rounds": num_rounds,
        "round_s": round_s,
    }
    print(f"\nartefact: {artefact.write('weights_in_place', configuration, results, arguments.out)}")


def write_and_map(spec: ExpertSpec, path: Path) -> npt.NDArray[np.uint16]:
    """E experts of gate, up, down as bf16 bits in a file, mapped read-only, every page touched."""
    one = (
        (torch.randn(spec.num_matrices * spec.d_ffn * spec.d_model) / 40)
        .bfloat16()
        .view(torch.uint16)
        .numpy()
    )
    with path.open("wb") as file:
        for e in range(spec.num_experts):
            file.write(np.roll(one, e * 1024).tobytes())
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    experts = np.frombuffer(mapping, np.uint16).reshape(spec.num_experts, spec.num_matrices, -1)
    experts[..., ::1024].max()
    return experts


def load(experts: npt.NDArray[np.uint16], spec: ExpertSpec, backend: str, num_threads: int | None) -> Loaded:
    start = time.perf_counter()
    bank = ExpertBank(spec, backend, pool=make_pool(num_threads))
    for e in range(spec.num_experts):
        gate, up, down = experts[e]
        bank.load(
            e,
            gate=bf16_matrix(gate, spec.d_ffn, spec.d_model),
            up=bf16_matrix(up, spec.d_ffn, spec.d_model),
            down=bf16_matrix(down, spec.d_model, spec.d_ffn),
        )
    return Loaded(bank, time.perf_counter() - start)


def bf16_matrix(bits: npt.NDArray[np.uint16], num_rows: int, num_columns: int) -> HostArray:
    return HostArray(bits.ctypes.data, (num_rows, num_columns), (num_columns, 1), "bf16", bits)


class InPlace:
    """Experts as the mapping has them, by the native kernel of dense layers: gate and up are one matrix there."""

    def __init__(self, experts: npt.NDArray[np.uint16], spec: ExpertSpec, num_threads: int | None) -> None:
        self.kernel, self.spec = DenseKernel(make_pool(num_threads)), spec
        in_values = 2 * spec.d_ffn * spec.d_model
        self.experts = [
            (
                bf16_matrix(values[:in_values], 2 * spec.d_ffn, spec.d_model),
                bf16_matrix(values[in_values:], spec.d_model, spec.d_ffn),
            )
            for values in experts.reshape(spec.num_experts, -1)
        ]
        self.whole = bf16_matrix(experts.reshape(-1), experts.size // spec.d_model, spec.d_model)

    def forward(self, x_TD: torch.Tensor, ids_TK: npt.NDArray[np.int64]) -> torch.Tensor:
        """y_TD of equal weights; every token has the same experts."""
        num_tokens, F = len(x_TD), self.spec.d_ffn
        y_TD = torch.zeros(num_tokens, self.spec.d_model)
        in_TF, out_TD = x_TD.new_empty(num_tokens, 2 * F), torch.empty_like(x_TD)
        for e in ids_TK[0].tolist():
            gate_up, down = self.experts[e]
            self.kernel(x_TD, gate_up, None, in_TF)
            h_TF = torch.nn.functional.silu(in_TF[:, :F]) * in_TF[:, F:]
            self.kernel(h_TF, down, None, out_TD)
            y_TD += out_TD
        return y_TD / ids_TK.shape[1]

    def whole_bytes_per_s(self) -> float:
        """Of one product of one token, in place, with everything; the best of three."""
        x_1D, out = (torch.ones(1, n, dtype=torch.bfloat16) for n in self.whole.shape[::-1])
        best_s = float("inf")
        for _ in range(3):
            start_s = time.perf_counter()
            self.kernel(x_1D, self.whole, None, out)
            best_s = min(best_s, time.perf_counter() - start_s)
        return self.whole.shape[0] * self.whole.shape[1] * 2 / best_s


def read_tests(experts: npt.NDArray[np.uint16], num_threads: int | None) -> Reads:
    return Reads(
        mapped_bytes_per_s=read_bandwidth_of(experts.ctypes.data, experts.nbytes, make_pool(num_threads)),
        huge_page_bytes_per_s=hostcompute.read_bandwidth(num_threads, experts.nbytes),
    )


def time_steps(
    spec: ExpertSpec,
    in_place: ExpertBank,
    packed: ExpertBank,
    dense: InPlace,
    num_tokens: int,
    num_rounds: int,
    round_s: float,
) -> dict[str, Summary]:
    """8 active experts of `num_tokens` each, rotating through all; all must give the same answer first."""
    routings = host_layers.rotating(spec, 8, num_tokens)
    x_TD = torch.randn(num_tokens, spec.d_model).bfloat16()
    weights_TK = np.full(routings[0].shape, 1 / 8, np.float32)
    answers = [bank.forward(x_TD.float(), routings[0], weights_TK) for bank in (in_place, packed)]
    has_dense = num_tokens <= dense.kernel.max_tokens
    if has_dense:
        answers.append(dense.forward(x_TD, routings[0]))
    for answer in answers[1:]:
        difference = float((answer - answers[0]).norm() / answers[0].norm())
        if not difference <= host_layers.CORRECT_RELATIVE_RMS:
            raise RuntimeError(f"two ways differ by {difference:.3g} relative")
    steps = {
        name: repeated(host_layers.bank_step([bank], x_TD, routings))
        for name, bank in (("in place, numba", in_place), ("packed", packed))
    }
    if has_dense:
        steps["in place"] = repeated(lambda i: dense.forward(x_TD, routings[i % len(routings)]))
    return interleave(steps, num_rounds, round_s)


def report(
    spec: ExpertSpec,
    in_place: Loaded,
    packed: Loaded,
    reads: list[Reads],
    whole_bytes_per_s: list[float],
    steps: dict[int, dict[str, Summary]],
) -> None:
    total_bytes = spec.num_experts * spec.expert_bytes
    print(f"{spec.num_experts} experts of {spec.d_model}x{spec.d_ffn}, {total_bytes / 1e9:.2f} GB in bf16")
    for name, loaded in (("in place", in_place), ("packed", packed)):
        print(f"  load {name:9} {loaded.load_s:6.2f} s  {total_bytes / loaded.load_s / 1e9:5.1f} GB/s")
    for one in reads:
        mapped, huge = one.mapped_bytes_per_s / 1e9, one.huge_page_bytes_per_s / 1e9
        print(
            f"  read test: mapped file {mapped:5.1f} GB/s, huge pages {huge:5.1f} GB/s ({huge / mapped:.2f}x)"
        )
    rates = ", ".join(f"{rate / 1e9:.1f}" for rate in whole_bytes_per_s)
    print(f"  one product over the whole mapping: {rates} GB/s")
    for num_tokens, both in steps.items():
        milliseconds = ", ".join(f"{name} {s.median_s * 1e3:.2f} ms" for name, s in both.items())
        faster = ratio(both["in place" if "in place" in both else "in place, numba"], both["packed"])
        print(f"  8 experts, {num_tokens:2} tokens each: {milliseconds}; packed is {faster:.2f}x faster")


if __name__ == "__main__":
    main()
