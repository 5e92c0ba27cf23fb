"""One MoE layer of Switch-Base's dimensions on this Gloo rank, in every form, and one case: check, then take turns.

W ranks, T tokens a rank, E experts, C rows of an expert and rank (padded), D model dim, F expert hidden dim.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from bench.moeshard import D_FFN, D_MODEL, Router, capacity, capacity_factor
from bench.padded_ep import PaddedExperts
from bench.sharded_simulated import imbalance
from hostcompute import Activation, ActivationKind, DType, ExpertBank, ExpertSpec, make_pool
from monde.core import RoutedBatch
from monde.executors.host import HostExecutor
from monde.executors.peers import PeersExecutor
from monde.executors.rank_probe import measure_ranks
from monde.executors.ranked import RankedExecutor
from monde.executors.ranked_batch import RankedBatch, exchange_batch
from monde.executors.ranks import RankGroup
from monde.executors.sharded import ShardedExecutor
from monde.planning.sharding import (
    BatchPlan,
    RankedCounts,
    WayFactors,
    assign_experts,
    cut_ffn,
    plan_batch,
)
from monde.weights.parts import FfnSlice, Part, SomeExperts
from monde.weights.staging import Staging

DEADLINE_S = 600.0
ROUND_BUDGET_S, MIN_ROUNDS, MAX_ROUNDS = 2.0, 9, 60
PADDED_ROUNDS = 2
MAX_PADDED_ROWS = 13_000  # of a rank, 120 GFLOP: more would take minutes on a core
# Sums of D and of F products, rounded in another order: errors grow with the root of their number; eight deviations.
TOLERANCE = 8 * 2.0**-24 * (D_MODEL + D_FFN) ** 0.5
NUM_CHECKED = 8  # tokens of a rank that are computed in float64 too


@dataclass
class CountedCompute:
    """What a rank computes with its part of the experts, and how much that was: rows times rows of F."""

    part: Part
    host: HostExecutor
    work: int = 0

    def __call__(self, batch: RoutedBatch, out_dtype: torch.dtype) -> Tensor:
        y_TD = self.host.submit(batch, out_dtype).wait()
        counts = self.host.bank.last_counts
        assert counts is not None
        self.work += counts.num_pairs * self.part.spec.d_ffn
        return y_TD


def paired(samples_s: list[float], beside_s: list[float]) -> dict[str, float]:
    """Of the ratios within rounds: the median, and from where to where it lies with 95% confidence (a sign test)."""
    ratios = sorted(a / b for a, b in zip(samples_s, beside_s, strict=True))
    n, outside, below = len(ratios), 0.0, 0
    while below < (n - 1) // 2 and outside + math.comb(n, below) / 2**n <= 0.025:
        outside += math.comb(n, below) / 2**n
        below += 1
    first = max(0, below - 1)
    return {"median": statistics.median(ratios), "low": ratios[first], "high": ratios[n - 1 - first]}


def expert_arrays(num_experts: int) -> Iterator[dict[str, Tensor]]:
    """Experts of one random matrix with rolled rows: distinct memory and distinct answers, quick to make."""
    generator = torch.Generator().manual_seed(0)
    up_FD = torch.randn((D_FFN, D_MODEL), generator=generator) / D_MODEL**0.5
    down_DF = torch.randn((D_MODEL, D_FFN), generator=generator) / D_FFN**0.5
    for e in range(num_experts):
        yield {"up": up_FD.roll(e, 0), "down": down_DF.roll(2 * e, 0)}


class RankedLayer:
    """One layer's experts on this rank: its slice of every one, and its own whole ones."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.ranks = ranks = RankGroup(
            init_device_mesh("cpu", (dist.get_world_size(),)), timeout_s=DEADLINE_S
        )
        spec = ExpertSpec(
            num_experts, D_MODEL, D_FFN, DType.F32, gated=False, activation=Activation(ActivationKind.RELU)
        )
        self.first_W1 = assign_experts(num_experts, ranks.size)
        bounds = torch.tensor(self.first_W1[1:])
        self.home_E1 = torch.bucketize(torch.arange(num_experts + 1), bounds, right=True)
        cuts_W1 = cut_ffn(D_FFN, (1,) * ranks.size)
        pool = make_pool(1)
        self.slice = self._computes(FfnSlice(spec, *cuts_W1[ranks.rank : ranks.rank + 2]), pool)
        self.whole = self._computes(SomeExperts(spec, *self.first_W1[ranks.rank : ranks.rank + 2]), pool)
        for e, arrays in enumerate(expert_arrays(num_experts)):
            for held in (self.slice, self.whole):
                local_id = held.part.local_id(e)
                if local_id is not None:
                    held.host.bank.load(local_id, **held.part.take(arrays))
        self.sharded = ShardedExecutor(ranks, self.slice)
        self.peers = PeersExecutor(ranks, self.whole, self.first_W1[ranks.rank])
        self.padded = PaddedExperts(ranks, self.whole, num_experts)
        shares_W = [1 / ranks.size] * ranks.size
        self.cost = measure_ranks(
            ranks, self.slice, num_experts, shares_W[0], shares_W, self.first_W1, D_MODEL, torch.float32,
            torch.device("cpu"),
        )  # fmt: skip

    def _computes(self, part: Part, pool: Any) -> CountedCompute:
        return CountedCompute(
            part, HostExecutor(ExpertBank(part.spec, "native", pool), Staging(pinned=False))
        )

    def case(self, num_tokens: int, router: Router) -> dict[str, Any]:
        """Rank 0's record is complete."""
        batch = self._batch(num_tokens, router)
        C = capacity(num_tokens, self.num_experts, capacity_factor(self.num_experts))
        dropped = [0]

        chosen = RankedExecutor(
            self.ranks, 0, self.first_W1, self._plan, self.sharded, self.peers
        )  # feedback of this case alone

        def ranked() -> RankedBatch:
            return exchange_batch(self.ranks, 0, batch, self.home_E1, self.num_experts)

        def padded() -> Tensor:
            made = self.padded.forward(batch, C)
            dropped[0] = made.num_dropped
            return made.y_TD

        contenders: dict[str, Callable[[], Tensor]] = {
            "dropless": lambda: self.peers.forward(ranked()),
            "control": lambda: self.peers.forward(ranked()),
            "sharded": lambda: self.sharded.forward(ranked(), 1),
            "chosen": lambda: chosen.forward(batch),
        }
        if C * self.num_experts <= MAX_PADDED_ROWS:
            contenders["deepspeed"] = padded
        wanted = [self._float64(batch)]
        work = {name: self._checked(name, step, wanted, dropped) for name, step in contenders.items()}
        samples = self._samples(contenders)
        assert chosen.last_plan is not None
        median_s = {name: statistics.median(one) for name, one in samples.items()}
        over = {name: paired(samples[name], samples["dropless"]) for name in ("chosen", "control")}
        pairs = num_tokens * self.ranks.size * D_FFN
        return {
            "num_ranks": self.ranks.size, "num_experts": self.num_experts, "num_tokens": num_tokens,
            "router": router.name, "cost": asdict(self.cost), "plan": asdict(chosen.last_plan), "capacity": C,
            "imbalance": {name: imbalance(by_rank) for name, by_rank in work.items()},
            "work_over_needed": {name: sum(by_rank) / pairs for name, by_rank in work.items()},
            "dropped": {name: sum(self.ranks.agree(dropped[0])) if name == "deepspeed" else 0 for name in contenders},
            "median_s": median_s, "of_dropless": over, "samples_s": samples,
        }  # fmt: skip

    def _plan(self, counts: RankedCounts, factors: WayFactors) -> BatchPlan:
        return plan_batch(counts, self.cost, factors=factors)

    def _batch(self, num_tokens: int, router: Router) -> RoutedBatch:
        rng = np.random.default_rng(self.ranks.rank)
        ids_T1 = rng.choice(self.num_experts, (num_tokens, 1), p=router.probability_E(self.num_experts))
        x_TD = torch.from_numpy(rng.standard_normal((num_tokens, D_MODEL), np.float32))
        weights_T1 = torch.from_numpy(rng.random((num_tokens, 1), np.float32))
        return RoutedBatch(x_TD, torch.from_numpy(ids_T1), weights_T1)

    def _checked(
        self, name: str, step: Callable[[], Tensor], wanted: list[Tensor], dropped: list[int]
    ) -> list[int]:
        """Work by rank of one step whose answer is right on every rank. wanted: of the first rows, or of all.

        Errors: AssertionError for rows off by more than TOLERANCE of their norm, for zeros that no drop explains, or
        pairs that nobody computed.
        """
        self.slice.work = self.whole.work = 0
        y_TD = step()
        work_W: list[int] = self.ranks.agree(self.slice.work + self.whole.work)
        kept_T = (y_TD != 0).any(dim=1)
        num_zero = int((~kept_T).sum())
        assert num_zero == dropped[0], f"{name}: {num_zero} rows of zeros, {dropped[0]} tokens dropped"
        for want_TD in wanted:
            off_T = (y_TD[: len(want_TD)] - want_TD).norm(dim=1) / want_TD.norm(dim=1)
            worst = float(off_T[kept_T[: len(want_TD)]].max())
            assert worst <= TOLERANCE, f"{name}: a row is off by {worst:.2g}, bound {TOLERANCE:.2g}"
        if len(wanted) == 1:
            wanted.append(y_TD)
        needed = sum(self.ranks.agree(len(y_TD))) * D_FFN
        assert sum(work_W) >= needed, f"{name}: computed {sum(work_W)} of {needed}"
        return work_W

    def _float64(self, batch: RoutedBatch) -> Tensor:
        ids = batch.topk_ids_TK[:NUM_CHECKED, 0].tolist()
        rows: dict[int, Tensor] = {}
        for e, arrays in enumerate(expert_arrays(max(ids) + 1)):
            for t in [t for t, expert_id in enumerate(ids) if expert_id == e]:
                hidden_F = torch.relu(arrays["up"].double() @ batch.x_TD[t].double())
                rows[t] = arrays["down"].double() @ hidden_F * batch.topk_weights_TK[t].double()
        return torch.stack([rows[t] for t in range(len(ids))])

    def _samples(self, contenders: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
        """Rounds in random order, until the budget is spent; DeepSpeed's take so long that two must do."""
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        shuffled, spent_s = random.Random(0), 0.0  # alike on all ranks
        for i in range(MAX_ROUNDS):
            for name in shuffled.sample(list(contenders), len(contenders)):
                if name == "deepspeed" and len(samples[name]) == PADDED_ROUNDS:
                    continue
                self.ranks.exchange(torch.zeros(1, dtype=torch.int32))  # a barrier
                start_s = time.perf_counter()
                contenders[name]()
                seconds_s = max(self.ranks.agree(time.perf_counter() - start_s))
                samples[name].append(float(f"{seconds_s:.5g}"))
                spent_s += seconds_s * (name != "deepspeed")
            if spent_s > ROUND_BUDGET_S and i + 1 >= MIN_ROUNDS:  # spent_s is the same on all ranks
                break
        return samples
