"""How others split the experts of a layer, on the same costs, for comparison. None of them cuts an expert.

Each takes a Load and a CostModel and returns an ExpertSplit; residents stay on the GPU in all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from monde.planning.cost import CostModel
from monde.planning.split import ExpertSplit, Lanes, Load, best_split

SplitPolicy = Callable[[Load, CostModel], ExpertSplit]


def monde_rule(load: Load, cost: CostModel, alpha: float = 1.0) -> ExpertSplit:
    """MoNDE's published rule: the H most loaded go to the GPU, H = alpha BW_bus / (BW_bus + BW_host) E_active."""
    lanes = Lanes(load, cost)
    bus, host = 1 / cost.gpu.h2d.s_per_unit, cost.host.bytes_per_s
    num_fetched = round(alpha * bus / (bus + host) * len(lanes.order))
    return lanes.split(min(num_fetched, len(lanes.order)))


def fiddler(load: Load, cost: CostModel) -> ExpertSplit:
    """Fiddler: every expert goes where it alone is done sooner, whatever the others do."""
    lanes = Lanes(load, cost)
    return lanes.split_by(cost.fetched_s(lanes.tokens_n) < lanes.host_n)


def two_ended(load: Load, cost: CostModel) -> ExpertSplit:
    """HybriMoE's queue: the GPU side takes the heaviest, the host the lightest; the next goes to who is done with it first.

    The loop is a merge: a side's i-th expert ends when its first i are done, so the earliest ends of both sides are
    those of the experts taken. Of the two readings of the rule, the stronger: the side that is free first, whatever
    it takes, would fetch a layer's only expert.
    """
    lanes = Lanes(load, cost)
    n = len(lanes.order)
    gpu_end_n = lanes.resident_s + np.cumsum(np.maximum(lanes.copy_one_s, lanes.gemm_n))
    host_end_n = lanes.trip_s + np.cumsum(lanes.host_n[::-1])
    ends = np.argsort(np.concatenate([gpu_end_n, host_end_n]), kind="stable")[:n]
    return lanes.split(int(np.count_nonzero(ends < n)))


def all_host(load: Load, cost: CostModel) -> ExpertSplit:
    return Lanes(load, cost).split(0)


def all_fetch(load: Load, cost: CostModel) -> ExpertSplit:
    lanes = Lanes(load, cost)
    return lanes.split(len(lanes.order))


SPLIT_POLICIES: dict[str, SplitPolicy] = {
    "best": best_split,
    "monde-rule": monde_rule,
    "fiddler": fiddler,
    "two-ended": two_ended,
    "all-host": all_host,
    "all-fetch": all_fetch,
}
FETCH_AHEAD = (
    "best",
    "all-fetch",
)  # before a layer's routing is known; the others' rules begin with its loads
