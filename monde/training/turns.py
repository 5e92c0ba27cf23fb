"""Steps that compete, timed in turn by all ranks together. The slowest rank's seconds count, so all decide alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

NEAR = 0.2  # more than medians of a few samples are off where ranks share cores


@dataclass(frozen=True)
class Effort:
    """Rounds of all steps, then up to more_rounds of those near the soonest, none begun after more_s of them."""

    rounds: int
    more_rounds: int
    more_s: float


def near_the_soonest(seconds: Sequence[float], near: float = NEAR) -> list[int]:
    """Which are within `near` of the least."""
    return [i for i, one in enumerate(seconds) if one <= min(seconds) * (1 + near)]


def in_turn(steps: Sequence[Callable[[], object]], device: torch.device, effort: Effort) -> list[list[float]]:
    """Samples of every step, one after another, each first in turn, after a round to warm up.

    Between steps that differ by a tenth noise decides, unless they are timed more often than those that are far off.
    """
    _one_round(steps, range(len(steps)), device)
    samples: list[list[float]] = [[] for _ in steps]
    spent_s = 0.0
    for turn in range(effort.rounds + effort.more_rounds):
        order = list(range(len(steps)))
        if turn >= effort.rounds:
            order = near_the_soonest([median(one) for one in samples])
            if len(order) < 2 or spent_s > effort.more_s:
                break
        first = turn % len(order)
        order = order[first:] + order[:first]
        round_s = _one_round(steps, order, device)
        spent_s += sum(round_s) if turn >= effort.rounds else 0.0
        for i, one in zip(order, round_s, strict=True):
            samples[i].append(one)
    return samples


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
