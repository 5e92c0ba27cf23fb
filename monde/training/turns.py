"""Steps that compete, timed in turn by all ranks together. The slowest rank's seconds count, so all decide alike."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

# A sample is of several in a row where one takes less: ranks do not leave a barrier together, and where they share
# cores each waits for its turn.
_SAMPLE_S, _MOST_IN_A_ROW = 0.03, 16
_ALIKE = 0.05
# Of a normal distribution: its sigma from the median deviation, and of its median over that of its mean.
_SIGMA_OF_MAD, _ERROR_OF_MEDIAN = 1.4826, 1.2533


@dataclass(frozen=True)
class Effort:
    """Rounds of all steps, then of those that may be the soonest, until there were least_rounds and these took more_s.

    Fewer where all that are left are alike.
    """

    rounds: int
    least_rounds: int
    more_s: float


def may_be_soonest(samples: Sequence[Sequence[float]]) -> list[int]:
    """Steps whose median may be the least, by two standard errors of every median."""
    intervals = [_interval(seconds) for seconds in samples]
    surely = min(high for _, high in intervals)
    return [i for i, (low, _) in enumerate(intervals) if low <= surely]


def are_alike(samples: Sequence[Sequence[float]]) -> bool:
    """Whether it does not matter which is chosen: the medians surely lie within _ALIKE of one another."""
    intervals = [_interval(seconds) for seconds in samples]
    return max(high for _, high in intervals) <= min(low for low, _ in intervals) * (1 + _ALIKE)


def _interval(seconds: Sequence[float]) -> tuple[float, float]:
    middle = median(seconds)
    spread = _SIGMA_OF_MAD * median(abs(one - middle) for one in seconds)
    error = 2 * _ERROR_OF_MEDIAN * spread / math.sqrt(len(seconds))
    return middle - error, middle + error


def in_turn(steps: Sequence[Callable[[], object]], device: torch.device, effort: Effort) -> list[list[float]]:
    """Samples of every step, one after another, each first in turn, after a round to warm up.

    Between steps that differ by a tenth noise decides, unless they are timed more often than those that are far off.
    """
    once_s = _one_round(steps, range(len(steps)), device)
    in_a_row = [min(max(math.ceil(_SAMPLE_S / max(one, 1e-9)), 1), _MOST_IN_A_ROW) for one in once_s]
    repeated = [partial(_repeat, step, count) for step, count in zip(steps, in_a_row, strict=True)]
    samples: list[list[float]] = [[] for _ in steps]
    spent_s = 0.0
    for turn in itertools.count():
        order = list(range(len(steps)))
        if turn >= effort.rounds:
            order = may_be_soonest(samples)
            enough = turn >= effort.least_rounds and spent_s > effort.more_s
            if len(order) < 2 or enough or are_alike([samples[i] for i in order]):
                break
        first = turn % len(order)
        order = order[first:] + order[:first]
        round_s = _one_round(repeated, order, device)
        spent_s += sum(round_s) if turn >= effort.rounds else 0.0
        for i, one in zip(order, round_s, strict=True):
            samples[i].append(one / in_a_row[i])
    return samples


def _repeat(step: Callable[[], object], count: int) -> None:
    for _ in range(count):
        step()


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """This rank's, from when all ranks are there."""
    dist.barrier()
    _synchronize(device)
    begin_s = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - begin_s


def slowest(seconds: Sequence[float], device: torch.device) -> list[float]:
    """Over all ranks. A rank that had nothing to do brings 0."""
    agreed = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return [float(one) for one in agreed]


def _one_round(
    steps: Sequence[Callable[[], object]], order: Sequence[int], device: torch.device
) -> list[float]:
    return slowest([seconds_of(steps[i], device) for i in order], device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
