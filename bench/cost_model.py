"""The cost model against the host: predicted and measured seconds of random mixes of experts and tokens.

Each mix is one call of a bank: A of its experts, with token counts drawn apart (log-uniform, so that most are few).
Predicted is the sum of CostModel.host_s over the experts, from this machine's calibrated profile; other shapes than
the calibrated one test what the model carries over. Calls are interleaved, so a slow moment meets all mixes.

python -m bench.cost_model [--machine profile.json] [--mixes 60] [--out results.json]

Letters: T tokens, E experts, A active experts, D model dim, F expert hidden dim.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench import artefact
from hostcompute import ExpertBank, ExpertSpec, make_pool
from monde.calibration.host import fill
from monde.cli.plan import find_profile
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.profile import HardwareProfile

# The calibrated shape, one of a third its bytes, and one of four times.
SPECS = (ExpertSpec(96, 2048, 768), ExpertSpec(256, 1024, 512), ExpertSpec(24, 4096, 1536))
MAX_TOKENS = 256
NUM_REPEATS = 9


@dataclass(frozen=True)
class Mix:
    """One call: tokens of each active expert; predicted and measured seconds."""

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


def measure(spec: ExpertSpec, profile: HardwareProfile, num_mixes: int, pool: object) -> list[Mix]:
    rng = np.random.default_rng(spec.d_ffn)
    cost = CostModel(profile, ExpertShape(spec.d_model, spec.d_ffn, spec.gated))
    with fill(ExpertBank(spec, "native", pool)) as bank:
        draws = [2 ** rng.uniform(0, np.log2(MAX_TOKENS), rng.integers(1, 17)) for _ in range(num_mixes)]
        calls = [Call(bank, np.rint(draw).astype(np.int64)) for draw in draws]
        rounds = [[call.seconds() for call in calls] for _ in range(NUM_REPEATS + 1)][1:]
    return [
        Mix(
            spec.d_model,
            spec.d_ffn,
            call.tokens_A.tolist(),
            float(cost.host_s(call.tokens_A).sum()),
            [one[i] for one in rounds],
        )
        for i, call in enumerate(calls)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cost_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--machine", help="file of a measured profile (default: this machine's)")
    parser.add_argument("--mixes", type=int, default=60, help="mixes of each shape (default 60)")
    parser.add_argument("--out", type=Path, help="where to write the artefact")
    options = parser.parse_args()
    profile = find_profile(options.machine)
    pool = make_pool(profile.machine.num_cores - (profile.gpu is not None))
    mixes: list[Mix] = []
    for spec in SPECS:
        of_spec = measure(spec, profile, options.mixes, pool)
        report(f"{spec.d_model}x{spec.d_ffn}", of_spec)
        mixes += of_spec
    median, p95 = report("all", mixes)
    configuration = {"mixes": options.mixes, "profile": dataclasses.asdict(profile)}
    results = {"median": median, "p95": p95, "mixes": [dataclasses.asdict(mix) for mix in mixes]}
    print(f"artefact: {artefact.write('cost_model', configuration, results, options.out)}")


def report(name: str, mixes: list[Mix]) -> tuple[float, float]:
    """Print and return the median and the 95th percentile of the relative errors."""
    errors = [mix.relative_error for mix in mixes]
    bias = statistics.median(mix.predicted_s / mix.measured_s for mix in mixes)
    median, p95 = float(np.median(errors)), float(np.quantile(errors, 0.95))
    print(
        f"{name:<10} error {median:6.1%} median, {p95:6.1%} p95; predicted / measured {bias:.2f}", flush=True
    )
    return median, p95


if __name__ == "__main__":
    main()
