"""What `monde plan` says next to what `monde bench` measures, on this machine, at five budgets.

    python -m bench.planned MODEL [--device cpu] [--machine profile.json] [--out results.json]

MODEL is a folder, of a few GB for an answer in four minutes (bench/make_model.py OUT --layers 6 --experts 128: 7.6 GB).
Budgets go from the smallest that works to all experts on the GPU, or 90% of the card. Residents are static and experts
equally popular in the plan; the share of pairs that residents took is printed next to their share of the experts.
A budget that fails, or whose turn comes after --seconds, is told in the artefact, and the exit code is 1.
With --device cpu the CPU stands in for the GPU: what has a slot takes the GPU's way through the program, on the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import artefact
from hostcompute.topology import machine_memory_bytes
from monde import profile_store
from monde.calibration.measure import calibrate
from monde.cli.plan import find_profile
from monde.cli.plan_forecast import Question
from monde.planning.budget import smallest_gpu_bytes
from monde.planning.profile import HardwareProfile

NUM_BUDGETS = 5
CARD_SHARE = 0.9  # the rest is the CUDA context's and the allocator's
HOST_SHARE = 0.9
LIMIT_S = 120.0  # of one budget: whatever hangs must not take the others with it


@dataclass(frozen=True)
class Row:
    """One budget and phase."""

    gpu_bytes: int
    phase: str
    num_resident: int
    num_experts: int
    hit_rate: float | None
    planned_tokens_per_s: float
    measured_tokens_per_s: float
    samples_tokens_per_s: list[float]
    limit: str

    @property
    def error(self) -> float:
        return self.planned_tokens_per_s / self.measured_tokens_per_s - 1


def this_profile(file: str | None, on_gpu: bool) -> HardwareProfile:
    """Of a file, or as it was calibrated, else measured now and kept for the next run unless the machine was noisy."""
    machine = profile_store.this_machine()
    profile = profile_store.load(machine) if file is None else find_profile(file)
    if profile is None:
        print("calibrating", file=sys.stderr, flush=True)
        profile = calibrate(machine)
        for noise in profile.noisy:
            print(f"noisy: {noise}", file=sys.stderr)
        if not profile.noisy:
            profile_store.save(profile)
    return profile if on_gpu else dataclasses.replace(profile, gpu=None)


def budgets(question: Question) -> list[int]:
    """gpu_memory in bytes, rising."""
    size = question.outlined(None).size
    if question.profile.gpu is None:
        return [round(size.all_slots_bytes * i / (NUM_BUDGETS - 1)) for i in range(NUM_BUDGETS)]
    smallest = smallest_gpu_bytes(size, question.host_bytes)
    card_bytes = int(question.profile.gpu.memory_bytes * CARD_SHARE)
    if smallest is None or smallest > card_bytes:
        raise ValueError(f"{question.model} does not fit this machine; make a smaller model")
    most = min(size.dense_bytes + size.kv_bytes + size.workspace_bytes + size.all_slots_bytes, card_bytes)
    return [int(b) for b in np.linspace(smallest, most, NUM_BUDGETS)]


def measured(model: str, gpu_bytes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of `monde bench` in a process of its own. Errors: RuntimeError with its last line."""
    command = [sys.executable, "-m", "monde", "bench", model, "--gpu-memory", str(gpu_bytes)]
    command += ["--residency", "static", "-p", str(options.prompt), "-n", str(options.generate), "-o", "json"]
    command += ["-b", str(options.batch), "-r", str(options.repetitions)]
    command += ["--device", options.device] if options.device else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"monde bench did not end within {LIMIT_S:g} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"monde bench failed: {last}")
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def compare(question: Question, gpu_bytes: int, options: argparse.Namespace) -> list[Row]:
    outlined = question.outlined(None)
    planned = question.forecast(outlined, gpu_bytes)
    rows = []
    for result in measured(question.model, gpu_bytes, options):
        phase = "prefill" if result["n_prompt"] else "decode"
        forecast = getattr(planned, phase)
        rows.append(
            Row(
                gpu_bytes,
                phase,
                sum(planned.plan.num_resident_L),
                sum(layer.num_experts for layer in outlined.size.layers),
                result["resident_share"],
                forecast.tokens_per_s,
                float(np.median(result["samples_ts"])),
                result["samples_ts"],
                forecast.limit,
            )
        )
    return rows


def compare_all(
    question: Question, options: argparse.Namespace, started_s: float
) -> tuple[list[Row], list[str]]:
    """Rows of all budgets, and why some have none."""
    rows: list[Row] = []
    failures: list[str] = []
    for gpu_bytes in budgets(question):
        name = f"{gpu_bytes / 2**30:.2f} GiB"
        if time.perf_counter() - started_s > options.seconds:
            failures.append(f"{name}: no time left; raise --seconds")
            continue
        try:
            found = compare(question, gpu_bytes, options)
        except (RuntimeError, ValueError, KeyError) as error:
            failures.append(f"{name}: {error}")
            print(f"{name} failed: {error}", flush=True)
            continue
        rows += found
        for row in found:
            print(text_of(row), flush=True)
    return rows, failures


def worst_of(rows: list[Row]) -> dict[str, float]:
    """The largest error of each phase that was measured."""
    phases = dict.fromkeys(row.phase for row in rows)
    return {phase: max(abs(row.error) for row in rows if row.phase == phase) for phase in phases}


def main() -> None:
    started_s = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m bench.planned",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("--device", choices=["cpu"], help="cpu: stand in for a GPU (default: the first GPU)")
    parser.add_argument("--machine", help="file of a measured profile (default: this machine's)")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=210.0, help="no budget starts later (default 210)")
    parser.add_argument("--out", type=Path, help="where to write the artefact")
    options = parser.parse_args()
    profile = this_profile(options.machine, on_gpu=options.device is None)
    if options.device is None and profile.gpu is None:
        parser.error("this machine has no usable GPU; give --device cpu")
    host_bytes = int(machine_memory_bytes() * HOST_SHARE)
    context = max(options.prompt, options.generate)
    question = Question(options.model, profile, host_bytes, context, options.batch, options.prompt)
    rows, failures = compare_all(question, options, started_s)
    worst = worst_of(rows)
    print("; ".join(f"{phase}: at most {error:.0%} off" for phase, error in worst.items()))
    for failure in failures:
        print(f"failed: {failure}")
    configuration = {k: v for k, v in vars(options).items() if k != "out"}
    results = {
        "worst": worst,
        "failures": failures,
        "profile": dataclasses.asdict(profile),
        "rows": [dataclasses.asdict(row) | {"error": row.error} for row in rows],
    }
    print(f"artefact: {artefact.write('planned', configuration, results, options.out)}")
    sys.exit(1 if failures else 0)


def text_of(row: Row) -> str:
    hits = "" if row.hit_rate is None else f", {row.hit_rate:.0%} of pairs"
    return (
        f"{row.gpu_bytes / 2**30:6.2f} GiB  {row.num_resident:5} of {row.num_experts} resident{hits}  "
        f"{row.phase:<7}  planned {row.planned_tokens_per_s:8.1f} tokens/s, measured "
        f"{row.measured_tokens_per_s:8.1f}, {row.error:+5.0%}  limit: {row.limit}"
    )


if __name__ == "__main__":
    main()
