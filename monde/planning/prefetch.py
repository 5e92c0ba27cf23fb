"""Which experts of the next layer to fetch before its routing is known: those that it will fetch in any case.

E experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from monde.planning.cost import CostModel
from monde.planning.split import Load, best_uncut

# An expert that expects so many tokens, each choosing by itself, gets none with a probability of exp(-8), 1 in 3000.
MIN_TOKENS = 8


def certain_fetches(
    expected_E: NDArray[np.float64],
    resident_E: NDArray[np.bool_],
    num_tokens: int,
    cost: CostModel,
    limit: int,
) -> list[int]:
    """At most `limit` experts, the most loaded first, that the best split of the expected tokens would fetch."""
    tokens_E = np.rint(expected_E).astype(np.int64)
    fetched = np.sort(best_uncut(Load(tokens_E, resident_E, num_tokens), cost))
    fetched = fetched[tokens_E[fetched] >= MIN_TOKENS]
    chosen: list[int] = fetched[np.argsort(-tokens_E[fetched], kind="stable")][:limit].tolist()
    return chosen
