"""The cost model against the machine: predicted and measured seconds of random mixes of experts and tokens.

Each mix is a layer of A experts with token counts drawn apart (log-uniform, so that most are few), of the calibrated
shape and of two others, which test what the model carries over. On the host: one call of a bank, predicted as a
call and the sum of CostModel.host_s. With a GPU, besides, every way that its experts can go (bench/cost_model_gpu.py): resident, fetched,
host beside the GPU, cut along F with all lanes at once, zero-copy alone and beside the host. What Python takes of a
prompt's layer is timed again in this run. By kind and over all: the median and the 95th percentile of the error. A kind that fails is told in the artefact, and the exit code is 1.

python -m bench.cost_model [--machine profile.json] [--mixes 40] [--seconds 210] [--out results.json]

Letters: T tokens, E experts, A active experts, D model dim, F expert hidden dim.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench import artefact, cost_model_gpu
from bench.cost_model_gpu import MAX_ACTIVE, MAX_TOKENS, Ran, random_mixes
from bench.planned import this_profile
from hostcompute import ExpertBank, ExpertSpec, make_pool
from monde.calibration.host import fill
from monde.calibration.prompts import PROMPT_TOKENS, PromptLayers
from monde.calibration.samples import take
from monde.device.pinned import PinnedRange
from monde.executors.host import host_threads
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.profile import HardwareProfile
from monde.weights.host import HostBlobs

# The calibrated shape, one of a third its bytes, and one of four times.
SPECS = (ExpertSpec(96, 2048, 768), ExpertSpec(256, 1024, 512), ExpertSpec(24, 4096, 1536))
NUM_REPEATS = 9


@dataclass(frozen=True)
class Mix:
    """One layer: where its experts were, tokens of each active one; predicted and measured seconds."""

    kind: str
    d_model: int
    d_ffn: int
    tokens_A: list[int]
    predicted_s: float
    samples_s: list[float]

    @property
    def measured_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def relative_error(self) -> float:
        return abs(self.predicted_s / self.measured_s - 1)


class Call:
    """A mix on a bank. Its experts move on by one call's worth, so that caches hold none."""

    def __init__(self, bank: ExpertBank, tokens_A: NDArray[np.int64]) -> None:
        self.bank, self.tokens_A = bank, tokens_A
        # Column a of the ids names expert a for its first tokens_A[a] rows and nothing below.
        self.taken_TA = np.arange(tokens_A.max())[:, None] < tokens_A
        self.x_TD = torch.randn(len(self.taken_TA), bank.spec.d_model).bfloat16()
        self.weights_TA = np.full(self.taken_TA.shape, 0.5, np.float32)
        self.out_TD = torch.empty_like(self.x_TD)
        self.first = 0

    def seconds(self) -> float:
        experts_A = (self.first + np.arange(len(self.tokens_A))) % self.bank.spec.num_experts
        self.first += len(self.tokens_A)
        ids_TA = np.where(self.taken_TA, experts_A, -1)
        start_s = time.perf_counter()
        self.bank.forward(self.x_TD, ids_TA, self.weights_TA, out=self.out_TD)
        return time.perf_counter() - start_s


@dataclass
class Report:
    """Everything measured, and what could not be: as much of it as there is becomes the artefact."""

    mixes: list[Mix] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, kind: str, spec: ExpertSpec, run: Callable[[], Iterable[Ran]]) -> None:
        """Whatever goes wrong with one kind is kept; the others are measured all the same."""
        name = f"{kind}, {spec.d_model}x{spec.d_ffn}"
        try:
            found = [Mix(ran[0], spec.d_model, spec.d_ffn, *ran[1:]) for ran in run()]
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {error}")
            print(f"{name:<36} failed: {error}", flush=True)
            return
        self.mixes += found
        if found:
            print(errors_text(name, found), flush=True)

    def by_kind(self) -> dict[str, list[Mix]]:
        kinds = dict.fromkeys(mix.kind for mix in self.mixes)
        return {kind: [mix for mix in self.mixes if mix.kind == kind] for kind in kinds}


def on_host(bank: ExpertBank, cost: CostModel, num_mixes: int) -> Iterator[Ran]:
    """Calls of the bank in turn, so that a slow moment meets all mixes."""
    rng = np.random.default_rng(bank.spec.d_ffn)
    calls = [Call(bank, tokens_A) for tokens_A in random_mixes(rng, num_mixes, MAX_TOKENS, MAX_ACTIVE)]
    rounds = [[call.seconds() for call in calls] for _ in range(NUM_REPEATS + 1)][1:]
    for i, call in enumerate(calls):
        predicted_s = cost.profile.host_call_s + float(cost.host_s(call.tokens_A).sum())
        yield "host", call.tokens_A.tolist(), predicted_s, [one[i] for one in rounds]


def launching_now(profile: HardwareProfile) -> HardwareProfile:
    """With Python's part of prompts timed again: on a shared machine it changes twofold within minutes, and whoever
    calibrated some time ago would test that instead of the model."""
    assert profile.gpu is not None
    device, spec = torch.device("cuda:0"), SPECS[0]
    cost = CostModel(profile, ExpertShape(spec.d_model, spec.d_ffn, spec.gated))
    with fill(ExpertBank(spec, "native", make_pool(host_threads()))) as bank:
        layers = PromptLayers(
            bank, cost_model_gpu.slots_of(HostBlobs(bank), spec.num_experts, device), device
        )
        samples = take(layers.probes(), lambda what: None)
        host_s = layers.num_active * float(cost.host_s(PROMPT_TOKENS)) + float(
            cost.round_trip_s(PROMPT_TOKENS)
        )
        prompt = layers.launches(samples, host_s, layers.num_active * float(cost.copy_s()))
        layers.close()
    return dataclasses.replace(profile, gpu=dataclasses.replace(profile.gpu, prompt=prompt))


def measure(spec: ExpertSpec, profile: HardwareProfile, options: argparse.Namespace, report: Report) -> None:
    """All kinds of one shape; those whose turn comes after --seconds are failures."""
    cost = CostModel(profile, ExpertShape(spec.d_model, spec.d_ffn, spec.gated))
    on_gpu = profile.gpu is not None
    pool = make_pool(host_threads() if on_gpu else profile.machine.num_cores)
    with fill(ExpertBank(spec, "native", pool)) as bank:
        report.add("host", spec, partial(on_host, bank, cost, options.mixes))
        if not on_gpu:
            return
        device, blobs = torch.device("cuda:0"), HostBlobs(bank)
        pinned = PinnedRange(*blobs.range_of(0, spec.num_experts), blobs, device)
        for kind, run in cost_model_gpu.run_kinds(bank, cost, pool, device, options.mixes):
            if time.perf_counter() - options.started_s > options.seconds:
                report.failures.append(f"{kind}, {spec.d_model}x{spec.d_ffn}: no time left; raise --seconds")
                continue
            report.add(kind, spec, run)
        pinned.close()


def errors_of(mixes: list[Mix]) -> tuple[float, float]:
    """The median and the 95th percentile of the relative errors."""
    errors = [mix.relative_error for mix in mixes]
    return float(np.median(errors)), float(np.quantile(errors, 0.95))


def errors_text(name: str, mixes: list[Mix]) -> str:
    median, p95 = errors_of(mixes)
    bias = statistics.median(mix.predicted_s / mix.measured_s for mix in mixes)
    return f"{name:<36} error {median:6.1%} median, {p95:6.1%} p95 of {len(mixes)}; predicted / measured {bias:.2f}"


def main() -> None:
    started_s = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m bench.cost_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--machine", help="file of a measured profile (default: this machine's, measured if need be)"
    )
    parser.add_argument("--mixes", type=int, default=40, help="mixes of each shape and kind (default 40)")
    parser.add_argument("--seconds", type=float, default=210.0, help="no kind starts later (default 210)")
    parser.add_argument("--out", type=Path, help="where to write the artefact")
    options = parser.parse_args()
    options.started_s = started_s
    profile = this_profile(options.machine, on_gpu=torch.cuda.is_available())
    if profile.gpu is not None:
        profile = launching_now(profile)
    report = Report()
    for spec in SPECS:
        measure(spec, profile, options, report)
    kinds = report.by_kind()
    print()
    for kind, mixes in kinds.items():
        print(errors_text(kind, mixes))
    if report.mixes:
        print(errors_text("all", report.mixes))
    for failure in report.failures:
        print(f"failed: {failure}")
    configuration = {"mixes": options.mixes, "profile": dataclasses.asdict(profile)}
    results = {
        "errors": {
            kind: dict(zip(("median", "p95"), errors_of(mixes), strict=True))
            for kind, mixes in (kinds | ({"all": report.mixes} if report.mixes else {})).items()
        },
        "failures": report.failures,
        "mixes": [dataclasses.asdict(mix) for mix in report.mixes],
    }
    print(f"artefact: {artefact.write('cost_model', configuration, results, options.out)}")
    print(f"done after {time.perf_counter() - started_s:.0f} s")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
