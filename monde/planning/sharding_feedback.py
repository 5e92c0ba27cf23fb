"""What a layer's steps took, over what was predicted: corrects each way's prediction where costs have drifted.

Costs are measured once, when a model has loaded; what else runs on the machine changes. Every rank notes the same
seconds (the slowest rank's, from the headers of the batch after), so all plan alike. A way that is predicted to be
better than it is gets tried, noted, and left again; one that was noted under a load that has gone is tried again once
the other way slows down.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass, field

from monde.planning.sharding import BatchPlan, Way, WayFactors

_NUM_KEPT = 9  # the median of as many: a late step changes nothing, and noise does not go from way to way
_MOST = 4.0  # a step takes longer than that only because of something that has nothing to do with its way


@dataclass
class StepFeedback:
    """Of one layer. Ratios are kept by way and by the power of two of tokens: fixed costs weigh on small batches."""

    _ratios: dict[tuple[Way, int], deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=_NUM_KEPT))
    )

    def note(self, plan: BatchPlan, factors: WayFactors, num_tokens: int, measured_s: float) -> None:
        """A step of num_tokens over all ranks that went plan.way; the plan was made with these factors."""
        sharded = plan.way is Way.SHARDED
        predicted_s = plan.sharded_s / factors.sharded if sharded else plan.peers_s / factors.peers
        if predicted_s > 0 and measured_s > 0:  # nan of a plan that knew no costs
            ratio = min(max(measured_s / predicted_s, 1 / _MOST), _MOST)
            self._ratios[plan.way, num_tokens.bit_length()].append(ratio)

    def factors(self, num_tokens: int) -> WayFactors:
        def factor(way: Way) -> float:
            ratios = self._ratios.get((way, num_tokens.bit_length()))
            return statistics.median(ratios) if ratios else 1.0

        return WayFactors(factor(Way.SHARDED), factor(Way.PEERS))
