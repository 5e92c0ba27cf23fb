"""Contenders timed in turn, round after round, so that all of them see the same machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Measure = Callable[[float], list[float]]
"""Runs for about the given seconds; returns the seconds of every step, or of one typical step."""


@dataclass(frozen=True)
class Summary:
    """Seconds per step over all rounds; `rounds_s` holds each round's median, `samples_s` everything."""

    median_s: float
    p10_s: float
    p90_s: float
    rounds_s: list[float]
    samples_s: list[float]

    @classmethod
    def of(cls, rounds: list[list[float]]) -> Summary:
        samples = sorted(s for one in rounds for s in one)
        return cls(
            median_s=statistics.median(samples),
            p10_s=samples[len(samples) // 10],
            p90_s=samples[len(samples) * 9 // 10],
            rounds_s=[statistics.median(one) for one in rounds],
            samples_s=[float(f"{s:.5g}") for s in samples],
        )


def interleave(contenders: Mapping[str, Measure], num_rounds: int, round_s: float) -> dict[str, Summary]:
    """Every contender for `round_s`, then all again, `num_rounds` times; the first one of a round rotates."""
    names = list(contenders)
    rounds: dict[str, list[list[float]]] = {name: [] for name in names}
    for i in range(num_rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            rounds[name].append(contenders[name](round_s))
    return {name: Summary.of(measured) for name, measured in rounds.items()}


def repeated(step: Callable[[int], None]) -> Measure:
    """Time step(i) one by one with a running i, at least 3 times, after a step that wakes the threads."""
    count = 0

    def measure(seconds_s: float) -> list[float]:
        nonlocal count
        step(count)
        samples: list[float] = []
        end = time.perf_counter() + seconds_s
        while len(samples) < 3 or time.perf_counter() < end:
            count += 1
            start = time.perf_counter()
            step(count)
            samples.append(time.perf_counter() - start)
        return samples

    return measure


def ratio(slower: Summary, faster: Summary) -> float:
    """How many times `faster` is faster: the median over rounds of the two medians of the same round."""
    return statistics.median(a / b for a, b in zip(slower.rounds_s, faster.rounds_s, strict=True))


def paired(samples_s: Sequence[float], beside_s: Sequence[float]) -> dict[str, float]:
    """Of the ratios within rounds: the median, and from where to where it lies with 95% confidence (a sign test)."""
    ratios = sorted(a / b for a, b in zip(samples_s, beside_s, strict=True))
    n, outside, below = len(ratios), 0.0, 0
    while below < (n - 1) // 2 and outside + math.comb(n, below) / 2**n <= 0.025:
        outside += math.comb(n, below) / 2**n
        below += 1
    first = max(0, below - 1)
    return {"median": statistics.median(ratios), "low": ratios[first], "high": ratios[n - 1 - first]}
