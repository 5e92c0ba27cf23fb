"""What is fetched before it is asked for: only what the plan of the expected tokens fetches, and surely needs."""

from __future__ import annotations

import numpy as np

from monde.planning.cost import CostModel, ExpertShape
from monde.planning.machines import DESCRIBED
from monde.planning.prefetch import MIN_TOKENS, certain_fetches
from monde.planning.split import Load, Where, best_split

COST = CostModel(DESCRIBED["h200"], ExpertShape(2048, 768))
E = 128


def test_the_heaviest_of_what_would_be_fetched() -> None:
    rng = np.random.default_rng(0)
    expected_E = rng.gamma(1.0, 128.0, E)
    resident_E = rng.random(E) < 0.25
    chosen = certain_fetches(expected_E, resident_E, 2048, COST, 14)
    tokens_E = np.rint(expected_E).astype(np.int64)
    fetched = set(np.flatnonzero(best_split(Load(tokens_E, resident_E, 2048), COST).where_E == Where.FETCHED))
    assert len(chosen) == 14
    assert set(chosen) <= fetched
    lightest = min(tokens_E[e] for e in chosen)
    assert all(tokens_E[e] <= lightest for e in fetched - set(chosen))


def test_nothing_where_the_plan_fetches_nothing_or_nothing_is_certain() -> None:
    none_E, all_E = np.zeros(E, bool), np.ones(E, bool)
    assert certain_fetches(np.full(E, 128.0), all_E, 2048, COST, 14) == []
    assert certain_fetches(np.full(E, MIN_TOKENS - 1.0), none_E, 64, COST, 14) == []
    assert certain_fetches(np.full(E, 128.0), none_E, 2048, COST, 0) == []
