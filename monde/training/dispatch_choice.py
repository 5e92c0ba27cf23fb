"""The soonest way for every exchange, by a profile that learns from the exchanges it is asked about.

A profile has timed whole exchanges at a few sizes. Where it says that ways are near one another, what it is off by
decides, and machines change besides. So the first exchange of about a size times these ways with its own rows, in turn,
and the profile holds from then on what they took.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch

from monde.planning.exchange import Exchange, exchanges, with_measured
from monde.planning.network_profile import NetworkProfile
from monde.training.turns import Effort, in_turn

EFFORT = Effort(rounds=5, least_rounds=15, more_s=2.5)
MOST_SIZES = 12  # timed of dispatches, and as many of combines: a job whose sizes never repeat stops trying
_PER_OCTAVE = 4  # sizes that are one size
_NEAR = 0.4  # predictions have been off by a third


@dataclass
class Chooser:
    """Collective: the same exchanges in the same order on all ranks, which then hold the same profile.

    rows_bytes: what one rank holds; away_bytes: of those, what goes to other nodes; adds: parts that are summed.
    """

    network: NetworkProfile
    device: torch.device
    _timed: dict[bool, set[int]] = field(default_factory=lambda: {False: set(), True: set()})
    _best: dict[tuple[int, int, bool], Exchange] = field(default_factory=dict)

    def best(self, rows_bytes: int, away_bytes: int, adds: bool) -> Exchange:
        """By what is known now. Simulating the ways takes a millisecond, an exchange may not: sizes share answers."""
        key = _size(rows_bytes), _size(away_bytes), adds
        if key not in self._best:
            self._best[key] = exchanges(self.network, rows_bytes, away_bytes, adds)[0]
        return self._best[key]

    def settle(self, rows_bytes: int, away_bytes: int, adds: bool, run: Callable[[Exchange], object]) -> None:
        """Time the ways that may be the soonest for these rows, unless that was done; run makes the exchange."""
        timed, size = self._timed[adds], _size(away_bytes)
        if away_bytes == 0 or size in timed or len(timed) == MOST_SIZES:
            return
        timed.add(size)
        known: set[tuple[str, int]] = set()
        while True:
            planned = exchanges(self.network, rows_bytes, away_bytes, adds)
            near = [one for one in planned if one.seconds_s <= planned[0].seconds_s * (1 + _NEAR)]
            # Once some were tried, the soonest may be one that was not: it is not believed either.
            if (planned[0].strategy, planned[0].chunks) in known or (len(near) < 2 and not known):
                break
            samples = in_turn([partial(run, one) for one in near], self.device, EFFORT)
            took = [
                Exchange(one.strategy, one.chunks, median(seconds))
                for one, seconds in zip(near, samples, strict=True)
            ]
            known |= {(one.strategy, one.chunks) for one in near}
            self.network = with_measured(self.network, rows_bytes, away_bytes, adds, took)
        self._best.clear()


def _size(num_bytes: int) -> int:
    return round(_PER_OCTAVE * math.log2(num_bytes)) if num_bytes else -1
