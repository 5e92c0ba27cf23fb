"""The forecast of `monde plan` against what was measured on GPU machines: reads artefacts, times nothing.

    python -m bench.forecast [--out results.json]

A profile is described from the ceilings that each artefact measured in its own run; what they do not hold is that of
the described H200. Cases: expert layers of a decode step, whole decode steps, expert layers of a prompt, all of
Qwen3-30B-A3B's dimensions. Letters: L layers, E experts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import artefact
from bench.decode.shapes import Shape, config_of
from bench.decode.skew import probabilities, shares
from bench.decode.steps import NUM_NEW
from monde.core import Placement
from monde.planning.cost import ExpertShape
from monde.planning.fit import AlphaBeta
from monde.planning.forecast import (
    ModelOutline,
    MoeLayer,
    decode_layer_s,
    dense_decode_s,
    forecast_decode,
    prefill_layer_s,
)
from monde.planning.machines import DESCRIBED
from monde.planning.profile import Curve, ExpertRate, HardwareProfile, Overlap

# What native kernels read of what the plain read test reads there: 0.77 to 0.92 when the cases below were measured, in decode_layers.
HOST_OF_READ = 0.87
# And the GPU's decode kernels, of a plain sum over its memory: (784.8 - 75.5) MB in (304 - 46) us, over 2990 GB/s.
GPU_OF_READ = 0.92
SHAPE, NUM_TOPK, NUM_EXPERTS = ExpertShape(2048, 768), 8, 128


@dataclass(frozen=True)
class Case:
    artefact: str
    what: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Of the prediction; above 0 where it is too slow."""
        return self.predicted_s / self.measured_s - 1


def described(
    host_read: float, h2d: float, host_beside: float, h2d_beside: float, hbm_read: float, round_trip_s: float
) -> HardwareProfile:
    """The machine from ceilings in bytes per second; round_trip_s is of one token."""
    base = DESCRIBED["h200"]
    assert base.gpu is not None
    # Shared machines: what ran beside a copy may have been quicker than alone.
    host_read, h2d = max(host_read, host_beside), max(h2d, h2d_beside)
    trip = base.gpu.round_trip
    alpha_s = max(0.0, round_trip_s - trip.s_per_unit * SHAPE.act_bytes_per_token)
    gpu = replace(
        base.gpu,
        expert=ExpertRate(0.0, hbm_read * GPU_OF_READ, base.gpu.expert.flops_per_s),
        h2d=AlphaBeta(base.gpu.h2d.alpha_s, 1 / h2d),
        zero_copy_bytes_per_s=h2d,
        round_trip=AlphaBeta(alpha_s, trip.s_per_unit),
        host_while_copying=Overlap(host_read / host_beside, h2d / h2d_beside),
    )
    host = ExpertRate(base.host_expert.overhead_s, host_read * HOST_OF_READ, base.host_expert.flops_per_s)
    return replace(base, host_expert=host, gpu=gpu)


def placed(num_resident: int) -> Placement:
    return Placement(tuple(e if e < num_resident else -1 for e in range(NUM_EXPERTS)))


def expert_layer(popularity_E: NDArray[np.float64], zero_copy: bool = True) -> MoeLayer:
    return MoeLayer(
        SHAPE, NUM_TOPK, popularity_E, zero_copy, num_ahead=14
    )  # two buffers of 64 MiB hold as many


UNIFORM = np.full(NUM_EXPERTS, 1 / NUM_EXPERTS)


def decode_layers(record: dict[str, Any]) -> Iterator[Case]:
    top = record["results"]["ceilings"]
    together = top["host_and_bus_read_bytes_per_s"]
    # That artefact has the sum alone; its parts are in the ratio of the prompts' artefact of such a machine.
    other = load("prefill_layers_gpu_machine")["results"]["ceilings"]
    of_host = other["host_read_beside_h2d_bytes_per_s"]
    of_host /= of_host + other["h2d_beside_read_bytes_per_s"]
    profile = described(
        top["host_read_bytes_per_s"],
        other["h2d_bytes_per_s"],
        together * of_host,
        together * (1 - of_host),
        top["hbm_read_bytes_per_s"],
        top["round_trip_s"],
    )
    for row in record["results"]["rows"]:
        if row["contender"] not in ("monde", "host computes"):
            continue
        # Routings are few: what they asked of cold experts is not quite what uniform ones do.
        num_resident, of_cold = (
            row["num_resident"],
            row["cold_bytes"] / (row["cold_bytes"] + row["resident_bytes"]),
        )
        is_cold_E = np.arange(NUM_EXPERTS) >= num_resident
        popularity_E = np.where(
            is_cold_E, of_cold / max(1, is_cold_E.sum()), (1 - of_cold) / max(1, num_resident)
        )
        layer = expert_layer(popularity_E, zero_copy=row["contender"] == "monde")
        seconds = decode_layer_s(layer, placed(row["num_resident"]), profile, row["batch"])
        what = f"{row['contender']}, batch {row['batch']}, {row['num_resident']} resident"
        yield Case("decode_layers", what, seconds, row["median_s"])


def qwen3(popularity_LE: NDArray[np.float64]) -> ModelOutline:
    config: Any = config_of("qwen3", None, toy=False)
    D, heads, kv_heads, dim = config.hidden_size, 32, 4, config.head_dim
    weights = config.num_hidden_layers * (2 * D * (heads + kv_heads) * dim + D * NUM_EXPERTS)
    return ModelOutline(
        layers=tuple(expert_layer(popularity_E) for popularity_E in popularity_LE),
        num_blocks=config.num_hidden_layers,
        dense_read_bytes=2 * (weights + D * config.vocab_size),
        dense_bytes_per_weight=2,
        kv_bytes_per_token=config.num_hidden_layers * 2 * 2 * kv_heads * dim,
        kv_passes=1.0,
        attention_dim=heads * dim,
        decode_tokens=64,
        chunk_tokens=4096,
    )


def whole_steps(name: str) -> Iterator[Case]:
    """Captured steps: without experts, with all of them resident, at a budget."""
    record = load(name)
    top = record["results"]["ceilings"]
    profile = described(
        top["host_read_bytes_per_s"],
        top["h2d_bytes_per_s"],
        top["overlapped_host_bytes_per_s"],
        top["overlapped_h2d_bytes_per_s"],
        top["hbm_read_bytes_per_s"],
        top["round_trip_s"],
    )
    shape = Shape("qwen3", 48, 48, NUM_EXPERTS, NUM_TOPK, 2048, 768)

    def popularity_LE(skew: str) -> NDArray[np.float64]:
        return np.stack([probabilities(share_E, NUM_TOPK) / NUM_TOPK for share_E in shares(skew, shape)])

    for row in record["results"]["rows"]:
        if row["group"] not in ("floor", "monde") or row["skipped"]:
            continue
        popularity = popularity_LE(row["skew"] or "measured")
        model, what = qwen3(popularity), f"{row['contender']} {row['budget']}, batch {row['batch']}"
        positions = row["context"] + NUM_NEW
        if row["group"] == "floor":
            seconds = dense_decode_s(model, profile, row["batch"], positions, is_captured=True)
        else:
            what += f", {row['skew']}"
            placements = [resident_for(p_E, row["figures"]["hit_rate"]) for p_E in popularity]
            seconds = forecast_decode(model, placements, profile, row["batch"], positions).step_s
        yield Case(name.removesuffix("_h200"), what, seconds, row["median_s"])


def resident_for(popularity_E: NDArray[np.float64], hit_rate: float) -> Placement:
    """Of the experts sorted by popularity, as many as take this share of the pairs."""
    return placed(NUM_EXPERTS if hit_rate == 1 else int(np.searchsorted(np.cumsum(popularity_E), hit_rate)))


def prefill_layers(name: str, which: Sequence[str]) -> Iterator[Case]:
    """The host by tokens an expert is a table of the run. which: of its residents."""
    record = load(name)
    top, told = record["results"]["ceilings"], record["results"]["profile"]
    profile = described(
        top["host_read_bytes_per_s"],
        top["h2d_bytes_per_s"],
        top["host_read_beside_h2d_bytes_per_s"],
        top["h2d_beside_read_bytes_per_s"],
        top["hbm_bytes_per_s"],
        load("decode_layers_gpu_machine")["results"]["ceilings"]["round_trip_s"],
    )
    host = told["host_expert"]
    curve = Curve(tuple(host["flops_per_s"]["x"]), tuple(host["flops_per_s"]["y"]))
    profile = replace(profile, host_expert=ExpertRate(host["overhead_s"], host["bytes_per_s"], curve))
    residents = {"none": 0, "quarter": NUM_EXPERTS // 4, "half": NUM_EXPERTS // 2, "all": NUM_EXPERTS}
    for row in record["results"]["rows"]:
        if row["contender"] == "monde" and row["residents"] in which:
            num_resident = residents[row["residents"]]
            seconds = prefill_layer_s(expert_layer(UNIFORM), placed(num_resident), profile, row["tokens"])
            what = f"{row['tokens']} tokens, {row['residents']} resident"
            yield Case(
                name.removesuffix("_gpu_machine").removesuffix("_h200"), what, seconds, row["median_s"]
            )


def load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((artefact.RESULTS / f"{name}.json").read_text())
    return record


def all_cases() -> list[Case]:
    return [
        *decode_layers(load("decode_layers_gpu_machine")),
        *whole_steps("decode_budgets_h200"),
        *whole_steps("decode_context_4096_h200"),
        *prefill_layers("prefill_layers_gpu_machine", ("none", "half")),
        *prefill_layers("prefill_half_all_h200", ("half",)),  # all: by other kernels than now
        *prefill_layers("prefill_h200", ("none", "quarter", "half")),
    ]


def report(cases: Sequence[Case]) -> tuple[float, float]:
    """Print every case; return the median and the 95th percentile of the absolute errors."""
    for case in cases:
        print(
            f"{case.artefact:<20} {case.what:<38} {case.predicted_s * 1e6:9.0f} us predicted, "
            f"{case.measured_s * 1e6:9.0f} measured, {case.error:+6.1%}"
        )
    errors = np.abs([case.error for case in cases])
    median, p95 = float(np.median(errors)), float(np.quantile(errors, 0.95))
    print(f"{len(cases)} cases: error {median:.1%} in the median, {p95:.1%} in the 95th percentile")
    return median, p95


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.forecast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="where to write the artefact")
    options = parser.parse_args()
    cases = all_cases()
    median, p95 = report(cases)
    results = {
        "median": median,
        "p95": p95,
        "cases": [asdict(case) | {"error": case.error} for case in cases],
    }
    configuration = {"host_of_read": HOST_OF_READ, "gpu_of_read": GPU_OF_READ}
    print(f"artefact: {artefact.write('forecast', configuration, results, options.out)}")


if __name__ == "__main__":
    main()
