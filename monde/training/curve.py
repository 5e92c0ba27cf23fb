"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monde.training.job import StepRecord

_COLOUR, _PALE = "#c2410c", "#fdba74"


def smoothed(losses: Sequence[float], share: float = 0.1) -> list[float]:
    """Exponential mean, corrected for its start."""
    mean, out = 0.0, []
    for i, loss in enumerate(losses, 1):
        mean += share * (loss - mean)
        out.append(mean / (1 - (1 - share) ** i))
    return out


def draw_losses(records: Sequence[StepRecord], title: str, path: Path) -> None:
    """Loss of every step, its running mean, and the rate below. Errors: ImportError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "the loss curve needs matplotlib; install it with `pip install 'monde[bench]'`"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [r.step + 1 for r in records], [r.loss for r in records]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(7, 4.8), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    top.plot(steps, losses, color=_PALE, linewidth=0.8, label="each step")
    top.plot(steps, smoothed(losses), color=_COLOUR, linewidth=1.6, label="running mean")
    top.set_ylabel("loss, nats per token")
    top.set_title(title, fontsize=11)
    top.legend(frameon=False)
    bottom.plot(steps, [r.learning_rate for r in records], color="#475569", linewidth=1.0)
    bottom.set_ylabel("rate")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
