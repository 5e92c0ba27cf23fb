"""`monde train` for real: the shipped model's shape, 300 steps, in one process, on two ranks, on two that are killed.

    python -m bench.training_job [--kill-at 170] [--out FILE]

Killed by SIGKILL, launcher and ranks, after step --kill-at; then the same command again, which resumes. Rounding grows
in training, and routing makes it jump: a token at the edge between two experts changes sides. How far it goes by itself
is what a control shows, one process with another number of threads, which sums in another order.
The artefact has every step's loss of all runs, and a picture beside it. Ends with 1 unless the resumed losses are those
of the run that was not killed, bit by bit, and two ranks stay within rounding of one process for --exact steps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import psutil

from bench import artefact
from monde.training.curve import smoothed
from monde.training.job import LOSSES, read_losses

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "train.toml"
# Fixed: chunks that are measured may differ after a resume, and with them the rounding of sums.
CHUNKS = "chunks = [2, 2]"
WITHIN = 2e-5  # fp32 sums in another order, 1e-7 each, and a few steps of Adam; as the tests have it
ONE, CONTROL, TWO, KILLED = (
    "one process", "one process, two threads", "two ranks", "two ranks, killed and resumed",
)  # fmt: skip


def command(config: Path, num_ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [sys.executable, *(launcher if num_ranks > 1 else []), "-m", "monde", "train", str(config)]


def config_file(folder: Path, name: str) -> Path:
    """The example, with fixed chunks and an output folder of its own."""
    text = EXAMPLE.read_text()
    model, chunks, output = '"../assets/moe-3m"', 'chunks = "auto"', '"../train-out"'
    assert all(text.count(one) == 1 for one in (model, chunks, output)), "the example has changed"
    text = text.replace(model, f'"{ROOT / "assets" / "moe-3m"}"').replace(chunks, CHUNKS)
    path = folder / f"{name.replace(' ', '-').replace(',', '')}.toml"
    path.write_text(text.replace(output, f'"{path.stem}"'))
    return path


def environment(num_threads: int = 1) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(num_threads)}


def run(config: Path, num_ranks: int, num_threads: int = 1) -> str:
    """Standard error. Errors: RuntimeError with its last line."""
    done = subprocess.run(
        command(config, num_ranks), capture_output=True, text=True, cwd=ROOT, env=environment(num_threads)
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stderr


def kill_after(config: Path, num_ranks: int, num_steps: int) -> int:
    """Start, and SIGKILL everybody once that many steps are on disk; how many were."""
    process = subprocess.Popen(
        command(config, num_ranks), stderr=subprocess.DEVNULL, cwd=ROOT, env=environment()
    )
    losses = config.with_suffix("") / LOSSES
    while len(read_losses(losses)) < num_steps:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before it was killed")
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    for member in (launcher, *launcher.children(recursive=True)):  # ranks have sessions of their own
        member.kill()
    process.wait()
    return len(read_losses(losses))


def distances(losses: list[float], others: list[float]) -> list[float]:
    """Relative, step by step."""
    return [abs(a / b - 1) for a, b in zip(losses, others, strict=True)]


def steps_within(off: list[float]) -> int:
    return next((step for step, one in enumerate(off) if one > WITHIN), len(off))


def draw(losses: dict[str, list[float]], killed_at: int, resumed_at: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(7, 5.2), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    styles: dict[str, dict[str, Any]] = {
        ONE: {"color": "#94a3b8", "linewidth": 4.0},
        CONTROL: {"color": "#38bdf8", "linewidth": 1.2},
        TWO: {"color": "#c2410c", "linewidth": 2.0},
        KILLED: {"color": "#0f172a", "linewidth": 1.0, "linestyle": "--"},
    }
    for name, style in styles.items():
        top.plot(range(1, len(losses[name]) + 1), smoothed(losses[name]), label=name, **style)
        if name != ONE:
            off = [max(one, 1e-8) for one in distances(losses[name], losses[ONE])]
            bottom.plot(range(1, len(off) + 1), off, **style)
    top.axvline(killed_at, color="#64748b", linewidth=0.8, linestyle=":")
    top.annotate(
        f"killed after {killed_at}, resumed from {resumed_at}", (killed_at + 3, losses[ONE][0] * 0.9)
    )
    top.set_ylabel("loss, running mean")
    top.legend(frameon=False)
    bottom.set_yscale("log")
    bottom.set_ylabel("relative to one process")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kill-at", type=int, default=170)
    parser.add_argument("--exact", type=int, default=40, help="steps for which rounding must stay rounding")
    parser.add_argument("--out", type=Path, default=artefact.RESULTS / "training_job.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        configs = {name: config_file(Path(scratch), name) for name in (ONE, CONTROL, TWO, KILLED)}
        killed_at = kill_after(configs[KILLED], 2, arguments.kill_at)
        told = run(configs[KILLED], 2)
        resumed_at = int(told.split("resuming after step ")[1].split()[0])
        run(configs[TWO], 2)
        run(configs[ONE], 1)
        run(configs[CONTROL], 1, num_threads=2)
        records = {name: read_losses(config.with_suffix("") / LOSSES) for name, config in configs.items()}
        settings = tomllib.loads(configs[TWO].read_text())
    losses = {name: [record.loss for record in found] for name, found in records.items()}
    off = {name: distances(losses[name], losses[ONE]) for name in (TWO, CONTROL)}
    found: dict[str, Any] = {
        "killed_after_step": killed_at,
        "resumed_after_step": resumed_at,
        "resumed_losses_are_identical": losses[KILLED] == losses[TWO],
        "steps_within_rounding_of_one_process": {name: steps_within(one) for name, one in off.items()},
        "largest_relative_distance": {name: max(one) for name, one in off.items()},
        "mean_loss_of_last_50_steps": {name: sum(one[-50:]) / 50 for name, one in losses.items()},
        "median_step_s": {
            name: sorted(r.seconds_s for r in found)[len(found) // 2] for name, found in records.items()
        },
        "losses": losses,
    }
    artefact.write("training-job", settings, found, arguments.out)
    draw(losses, killed_at, resumed_at, arguments.out.with_suffix(".png"))
    print({key: value for key, value in found.items() if key != "losses"})
    if losses[KILLED] != losses[TWO] or steps_within(off[TWO]) < arguments.exact:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
