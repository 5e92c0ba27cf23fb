"""What planning itself costs: a split at 8 to 2048 experts and the tasks made of it, a placement and a replan of 48
layers of 128 experts.

python -m bench.planning [--out results.json]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench import artefact
from monde.planning.budget import LayerSize
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.machines import DESCRIBED
from monde.planning.placement import place, plan_swaps
from monde.planning.prefill_schedule import prefill_schedule
from monde.planning.split import Load, best_split
from monde.planning.staging import Staging

NUM_ROUNDS, NUM_CALLS = 15, 30
COST = CostModel(DESCRIBED["h200"], ExpertShape(2048, 768))


def rounds_s(call: Callable[[], object]) -> list[float]:
    """Seconds per call of every round, after one round to warm up."""
    rounds = []
    for _ in range(NUM_ROUNDS + 1):
        start_s = time.perf_counter()
        for _ in range(NUM_CALLS):
            call()
        rounds.append((time.perf_counter() - start_s) / NUM_CALLS)
    return rounds[1:]


def load_of(num_experts: int) -> Load:
    """2048 tokens, top-8, popularity 1 / rank, a fifth of the experts resident, cuts of 64 rows."""
    rng = np.random.default_rng(num_experts)
    popularity_E = 1 / np.arange(1, num_experts + 1)
    tokens_E = rng.multinomial(8 * 2048, rng.permutation(popularity_E / popularity_E.sum()))
    return Load(tokens_E, rng.random(num_experts) < 0.2, 2048, 64)


def split_case(num_experts: int) -> Callable[[], object]:
    load = load_of(num_experts)
    return lambda: best_split(load, COST)


def schedule_case(num_experts: int) -> Callable[[], object]:
    """Of that split, through two buffers of seven experts, as in 64 MiB each."""
    load = load_of(num_experts)
    split, slot_E = best_split(load, COST), np.where(load.resident_E, np.arange(num_experts), -1)
    staging = Staging(768, 7, 2)
    return lambda: prefill_schedule(load, split, COST, staging, slot_E)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where to write the artefact")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    layers = [LayerSize(128, 9437184, 9437184)] * 48
    value_L = [rng.pareto(1.5, 128) for _ in layers]
    later_L = [value_E * rng.lognormal(0, 0.3, 128) for value_E in value_L]
    placements = place(value_L, layers, 16 * 2**30)
    cases = {f"split of {E} experts": split_case(E) for E in (8, 128, 512, 2048)}
    cases |= {f"tasks of {E} experts": schedule_case(E) for E in (8, 128, 512)}
    cases["placement of 48 x 128"] = lambda: place(value_L, layers, 16 * 2**30)
    cases["swaps of 48 x 128"] = lambda: plan_swaps(placements, later_L, 96, 0.2)
    results = {}
    for name, call in cases.items():
        rounds = rounds_s(call)
        results[name] = rounds
        print(f"{name:<24} {1e6 * min(rounds):8.0f} us at best, {1e6 * np.median(rounds):.0f} in the median")
    artefact.write("planning", {"num_rounds": NUM_ROUNDS, "num_calls": NUM_CALLS}, results, args.out)


if __name__ == "__main__":
    main()
