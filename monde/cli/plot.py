"""Results as a picture: tokens/s of every runner, prompt and generation side by side, with the spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monde.cli.records import BenchReport, BenchTest, TestResult

MONDE_COLOUR = "#c2410c"
BASELINE_COLOURS = ("#475569", "#94a3b8", "#cbd5e1", "#e2e8f0")


def check_plot(path: Path) -> None:
    """Before anything is measured: can the picture be drawn and stored at all?

    Errors: ValueError for a suffix or folder that cannot be, ImportError without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--plot needs matplotlib; install it with `pip install 'monde[bench]'`") from error
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path}: expected a name that ends in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: the folder {path.parent} does not exist; make it first")


def draw(report: BenchReport, path: Path) -> None:
    """Store the picture at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    kinds = [("Prompt (prefill)", True), ("Generation (decode)", False)]
    panels = [
        (title, _of_kind(report, is_prompt)) for title, is_prompt in kinds if _of_kind(report, is_prompt)
    ]
    num_bars = sum(len(results) for _, results in panels)
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(max(4.5 * len(panels), 1.0 + 0.85 * num_bars), 4.6),
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, results) in zip(axes[0], panels, strict=True):
        _panel(axis, title, report, results)
    labels = _labels(report)
    handles = [Patch(color=_colour(labels, label), label=label) for label in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(labels), frameon=False)
    model, machine = report.model, report.machine
    size = f"{model.num_params / 1e6:,.0f}M parameters, {model.dtype}"
    figure.suptitle(
        f"{model.name} ({model.model_type}, {size})\n{machine.gpu or machine.cpu}, {machine.num_cores} cores",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _of_kind(report: BenchReport, is_prompt: bool) -> list[TestResult]:
    return [r for r in report.results if bool(r.test.num_prompt) == is_prompt and not r.skipped]


def _panel(axis: Any, title: str, report: BenchReport, results: Sequence[TestResult]) -> None:
    labels = _labels(report)
    tests = list(dict.fromkeys(r.test for r in results))
    width = 0.8 / len(labels)
    for idx, label in enumerate(labels):
        mine = [r for r in results if r.runner.label == label]
        xs = [tests.index(r.test) + (idx - (len(labels) - 1) / 2) * width for r in mine]
        bars = axis.bar(
            xs,
            [r.tokens_per_s for r in mine],
            width * 0.92,
            yerr=[r.tokens_per_s_std for r in mine],
            capsize=3,
            ecolor="#1e293b",
            color=_colour(labels, label),
        )
        axis.bar_label(bars, [_bar_text(report, r) for r in mine], padding=3, fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("tokens/s (mean ± standard deviation)")
    axis.set_xticks(range(len(tests)), [_tick(test) for test in tests])
    axis.set_xlim(-0.5, len(tests) - 0.5)  # the room of a runner that skipped a test stays empty
    axis.set_ylim(bottom=0)
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def _bar_text(report: BenchReport, result: TestResult) -> str:
    value = result.tokens_per_s
    speed = f"{value:#.3g}" if value < 100 else f"{value:,.0f}"
    speedup = report.speedup(result)
    return speed if speedup is None or result.runner.label != "monde" else f"{speed}\n{speedup:.2f}x"


def _labels(report: BenchReport) -> list[str]:
    return list(dict.fromkeys(r.runner.label for r in report.results))


def _tick(test: BenchTest) -> str:
    return f"{test.name}\nbatch {test.batch}" if test.batch > 1 else test.name


def _colour(labels: list[str], label: str) -> str:
    if label == "monde":
        return MONDE_COLOUR
    baselines = [other for other in labels if other != "monde"]
    return BASELINE_COLOURS[baselines.index(label) % len(BASELINE_COLOURS)]
