"""`monde train` for real: the shipped model's shape, 300 steps, on one rank, on two, and on two that are killed midway.

    python -m bench.training_job [--kill-at 170] [--out FILE]

Killed by SIGKILL, launcher and ranks, after step --kill-at; then the same command again, which resumes. The artefact
has every step's loss of the three runs, and a picture beside it. Ends with 1 unless the resumed losses are those of the
run that was not killed, bit by bit, and those of one process within a relative 1e-3.
"""

from __future__ import annotations

import argparse
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
# Rounding alone: sums over two ranks differ by 1e-7 of themselves, and 300 steps of Adam carry that on.
WITHIN = 1e-3
ONE, TWO, KILLED = "one process", "two ranks", "two ranks, killed and resumed"


def command(config: Path, num_ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [sys.executable, *(launcher if num_ranks > 1 else []), "-m", "monde.cli", "train", str(config)]


def config_file(folder: Path, name: str) -> Path:
    """The example, with fixed chunks and an output folder of its own."""
    text = EXAMPLE.read_text()
    model, chunks, output = '"../assets/moe-3m"', 'chunks = "auto"', '"../train-out"'
    assert all(text.count(one) == 1 for one in (model, chunks, output)), "the example has changed"
    text = text.replace(model, f'"{ROOT / "assets" / "moe-3m"}"').replace(chunks, CHUNKS)
    path = folder / f"{name.replace(' ', '-').replace(',', '')}.toml"
    path.write_text(text.replace(output, f'"{path.stem}"'))
    return path


def run(config: Path, num_ranks: int) -> str:
    """Standard error. Errors: RuntimeError with its last line."""
    done = subprocess.run(command(config, num_ranks), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stderr


def kill_after(config: Path, num_ranks: int, num_steps: int) -> int:
    """Start, and SIGKILL everybody once that many steps are on disk; how many were."""
    process = subprocess.Popen(command(config, num_ranks), stderr=subprocess.DEVNULL, cwd=ROOT)
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


def draw(losses: dict[str, list[float]], killed_at: int, resumed_at: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(7, 5.2), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    styles = {
        ONE: {"color": "#94a3b8", "linewidth": 4.0},
        TWO: {"color": "#c2410c", "linewidth": 2.0},
        KILLED: {"color": "#0f172a", "linewidth": 1.0, "linestyle": "--"},
    }
    for name, values in losses.items():
        top.plot(range(1, len(values) + 1), smoothed(values), label=name, **styles[name])
    top.axvline(killed_at, color="#64748b", linewidth=0.8, linestyle=":")
    top.annotate(f"killed after {killed_at}, resumed from {resumed_at}", (killed_at + 3, losses[ONE][0] * 0.95))
    top.set_ylabel("loss, running mean")
    top.legend(frameon=False)
    for name in (TWO, KILLED):
        off = [abs(a / b - 1) for a, b in zip(losses[name], losses[ONE], strict=True)]
        bottom.plot(range(1, len(off) + 1), off, **styles[name])
    bottom.set_yscale("log")
    bottom.set_ylabel("off one process")
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
    parser.add_argument("--out", type=Path, default=artefact.RESULTS / "training_job.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        configs = {name: config_file(Path(scratch), name) for name in (ONE, TWO, KILLED)}
        killed_at = kill_after(configs[KILLED], 2, arguments.kill_at)
        told = run(configs[KILLED], 2)
        resumed_at = int(told.split("resuming after step ")[1].split()[0])
        run(configs[TWO], 2)
        run(configs[ONE], 1)
        records = {name: read_losses(configs[name].with_suffix("") / LOSSES) for name in (ONE, TWO, KILLED)}
        settings = tomllib.loads(configs[TWO].read_text())
    losses = {name: [record.loss for record in found] for name, found in records.items()}
    off = max(abs(a / b - 1) for a, b in zip(losses[TWO], losses[ONE], strict=True))
    found = {
        "killed_after_step": killed_at,
        "resumed_after_step": resumed_at,
        "resumed_losses_are_identical": losses[KILLED] == losses[TWO],
        "largest_relative_distance_from_one_process": off,
        "median_step_s": {
            name: sorted(r.seconds_s for r in found)[len(found) // 2] for name, found in records.items()
        },
        "losses": losses,
    }
    artefact.write("training-job", settings, found, arguments.out)
    draw(losses, killed_at, resumed_at, arguments.out.with_suffix(".png"))
    print({key: value for key, value in found.items() if key != "losses"})
    if losses[KILLED] != losses[TWO] or off > WITHIN:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
