"""A plan as a picture: expected tokens/s over gpu_memory, the budget that was asked for marked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from monde.cli.plot import MONDE_COLOUR

if TYPE_CHECKING:
    from monde.cli.plan_forecast import Forecast

_NUM_BUDGETS = 25


def sweep(forecast: Callable[[int], Forecast], now: Forecast, card_bytes: int) -> list[Forecast]:
    """Forecasts from the least budget that works to where all experts are resident, or the card is full."""
    from monde.planning.budget import BudgetError

    size = now.plan.size
    fixed_bytes = now.plan.gpu_used_bytes - now.plan.slots_bytes
    last_bytes = min(fixed_bytes + size.all_slots_bytes, card_bytes)
    step_bytes = (last_bytes - fixed_bytes) / (_NUM_BUDGETS - 1)
    found = []
    for i in range(_NUM_BUDGETS):
        try:
            found.append(forecast(fixed_bytes + int(i * step_bytes)))
        except BudgetError:  # so small that host memory cannot hold the other experts
            continue
    return found


def draw_budgets(sweep: list[Forecast], now: Forecast, title: str, path: Path) -> None:
    """Store the picture at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, name in zip(axes, ("prefill", "decode"), strict=True):
        gib = [forecast.plan.gpu_bytes / 2**30 for forecast in sweep]
        axis.plot(gib, [getattr(f, name).tokens_per_s for f in sweep], color=MONDE_COLOUR)
        speed = getattr(now, name).tokens_per_s
        budget_gib = min(now.plan.gpu_bytes / 2**30, gib[-1])  # more changes nothing
        axis.plot([budget_gib], [speed], "o", color=MONDE_COLOUR)
        axis.annotate(
            f"{speed:#.3g}", (budget_gib, speed), xytext=(0, 8), textcoords="offset points", ha="center"
        )
        axis.set_title(f"{name}, limited by the {getattr(now, name).limit}", fontsize=10)
        axis.set_xlabel("gpu_memory in GiB")
        axis.set_ylabel("tokens/s")
        axis.set_ylim(0, 1.15 * max(getattr(f, name).tokens_per_s for f in sweep))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
