"""From timings alone and side by side to an Overlap."""

from __future__ import annotations

from monde.calibration.samples import Samples
from monde.planning.profile import Overlap


def beside_names(activity: str) -> tuple[str, str, str, str]:
    """What a pair is timed as: the activity alone, a copy alone, the activity beside copies, a copy beside it."""
    return (
        f"{activity} step without copies",
        f"copy without {activity} steps",
        f"{activity} step beside copies",
        f"copy beside {activity} steps",
    )


def overlap_of(activity: str, samples: dict[str, Samples]) -> Overlap:
    """How much longer (a step of the activity, a copy) takes beside the other."""
    step, copy, step_beside, copy_beside = (samples[name].median_s for name in beside_names(activity))
    return nearest_overlap(step_beside / step, copy_beside / copy)


def nearest_overlap(first: float, second: float) -> Overlap:
    """The factors, where an Overlap can have them; its bounds otherwise.

    A factor below 1 says that both run freely. Two that lose to one after the other, 1/first + 1/second < 1, keep
    their ratio and are scaled to lose nothing: a plan would rather run them in turn than believe a loss.
    """
    first, second = max(first, 1.0), max(second, 1.0)
    together = min(1.0, 1 / first + 1 / second)
    return Overlap(first * together, second * together)
