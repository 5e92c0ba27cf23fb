"""Timings in two halves, all of the first before any of the second: a machine whose speed changes shows it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from monde.planning.fit import NOISY_SHARE, AlphaBeta
from monde.planning.profile import Noise, PoorFit

_MIN_SAMPLES = 3

Timings = Mapping[str, Sequence[float]]  # seconds under the name of what was timed
Progress = Callable[[str], None]  # told what comes next


@dataclass(frozen=True)
class Probe:
    """One measurement; `run` takes a half of its samples. Activities timed together have names of their own."""

    what: str
    run: Callable[[], Timings]


@dataclass(frozen=True)
class Samples:
    """Seconds of one activity, in order."""

    first_s: tuple[float, ...]
    second_s: tuple[float, ...]

    @property
    def all_s(self) -> tuple[float, ...]:
        return self.first_s + self.second_s

    @property
    def median_s(self) -> float:
        return statistics.median(self.all_s)


def take(probes: Sequence[Probe], progress: Progress) -> dict[str, Samples]:
    """Both halves of every probe; each name belongs to one probe."""
    halves: list[dict[str, tuple[float, ...]]] = []
    for _ in range(2):
        half: dict[str, tuple[float, ...]] = {}
        for probe in probes:
            progress(probe.what)
            half |= {what: tuple(seconds) for what, seconds in probe.run().items()}
        halves.append(half)
    return {what: Samples(halves[0][what], halves[1][what]) for what in halves[0]}


def noise_of(samples: Mapping[str, Samples]) -> tuple[Noise, ...]:
    """The activities whose halves' medians are more than NOISY_SHARE apart."""
    both = (
        Noise(what, statistics.median(s.first_s), statistics.median(s.second_s))
        for what, s in samples.items()
    )
    return tuple(noise for noise in both if noise.share > NOISY_SHARE)


def poor_fits(fits: Mapping[str, AlphaBeta]) -> tuple[PoorFit, ...]:
    """The lines, by the name of what was timed, that tell nothing of it."""
    return tuple(PoorFit(what, fit.r2, fit.spread) for what, fit in fits.items() if fit.is_poor)


def repeated(step: Callable[[], object], total_s: float) -> list[float]:
    """Seconds of each step, after one to warm up, for about `total_s` and at least three times."""
    step()
    samples: list[float] = []
    while len(samples) < _MIN_SAMPLES or sum(samples) < total_s:
        samples.append(seconds_of(step))
    return samples


def seconds_of(step: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    step()
    return time.perf_counter() - start_s
