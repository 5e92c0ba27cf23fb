"""Timings in two halves, all of the first before any of the second: a machine whose speed changes shows it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from monde.planning.fit import NOISY_SHARE, AlphaBeta
from monde.planning.profile import Noise, PoorFit

_MIN_SAMPLES = 3
_NUM_RETRIES = 2

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


def take(probes: Sequence[Probe], progress: Progress, retry_until_s: float = 0.0) -> dict[str, Samples]:
    """Both halves of every probe; each name belongs to one probe.

    Probes whose halves disagree run again, as long as that begins within retry_until_s of the first run: on a shared
    machine a slow moment passes. Of several runs the two that agree best are kept, in order; where none agree that is
    told as ever.
    """
    end_s = time.perf_counter() + retry_until_s
    runs: dict[str, list[tuple[float, ...]]] = {}

    def run(probe: Probe) -> None:
        progress(probe.what)
        for what, seconds in probe.run().items():
            runs.setdefault(what, []).append(tuple(seconds))
            probe_of[what] = probe

    probe_of: dict[str, Probe] = {}
    for _ in range(2):
        for probe in probes:
            run(probe)
    for _ in range(_NUM_RETRIES):
        noisy = {noise.what for noise in noise_of(_closest(runs))}
        for probe in dict.fromkeys(probe_of[what] for what in runs if what in noisy):
            if time.perf_counter() < end_s:
                run(probe)
    return _closest(runs)


def _closest(runs: Mapping[str, Sequence[tuple[float, ...]]]) -> dict[str, Samples]:
    """The two runs of each whose medians are nearest to each other; the first two of equals."""
    found = {}
    for what, taken in runs.items():
        pairs = [Samples(a, b) for a, b in combinations(taken, 2)]
        found[what] = min(pairs, key=lambda s: _noise(what, s).share)
    return found


def noise_of(samples: Mapping[str, Samples]) -> tuple[Noise, ...]:
    """The activities whose halves' medians are more than NOISY_SHARE apart."""
    both = (_noise(what, s) for what, s in samples.items())
    return tuple(noise for noise in both if noise.share > NOISY_SHARE)


def _noise(what: str, samples: Samples) -> Noise:
    return Noise(what, statistics.median(samples.first_s), statistics.median(samples.second_s))


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
