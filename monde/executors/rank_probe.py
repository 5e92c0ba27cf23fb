"""What rows and experts take on these very ranks: measured when a model has loaded, the slowest rank's figures for all.

The same calls as in a layer, at a few sizes; about a second. All ranks take part. D model dim, N rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from monde.core import RoutedBatch
from monde.executors.ranks import RankGroup
from monde.executors.rows import gather_rows, sum_rows, swap_rows
from monde.executors.sharded import Compute
from monde.planning.fit import fit_alpha_beta
from monde.planning.profile import Overlap
from monde.planning.sharding import RankedCost

GATHERED_BYTES = (
    2**16,
    2**19,
    2**22,
)  # on all ranks together: small, so that measuring takes no memory to speak of
TOKENS = (1, 16, 128)  # an expert
_ROUNDS = 5


def measure_ranks(
    ranks: RankGroup,
    compute: Compute,
    num_held: int,
    held_share: float,
    share_W: Sequence[float],
    first_expert_W1: tuple[int, ...],
    d_model: int,
    dtype: torch.dtype,
    device: torch.device,
) -> RankedCost:
    """compute works on num_held experts, of which this rank holds held_share of F; costs come out for whole ones.

    The same record on all ranks, or they would plan differently.
    """
    W = ranks.size

    def rows(num: int) -> Tensor:
        return torch.ones((num, d_model), device=device)

    def gather(num: int) -> Callable[[], object]:
        mine_ND = rows(num)
        return lambda: gather_rows(ranks, mine_ND, [num] * W).wait()

    def swap(num: int) -> Callable[[], object]:
        out_ND = rows(num * W)
        return lambda: swap_rows(ranks, out_ND, [num] * W, [num] * W, ranks.inward).wait()

    def total(num: int) -> Callable[[], object]:
        partial_ND = rows(num * W)
        return lambda: sum_rows(ranks, partial_ND, [num] * W).wait()

    num_timed = max(1, min(num_held, 8))
    following = 0

    def experts(num_tokens: int) -> Callable[[], object]:
        """num_tokens for each of up to 8 experts, of all in turn: the same ones again would still be in the cache."""
        x_TD = torch.ones((min(num_held, 8) * num_tokens, d_model), device=device, dtype=dtype)
        weights_T1 = torch.ones((len(x_TD), 1), device=device)
        each_T = torch.arange(min(num_held, 8), device=device).repeat_interleave(num_tokens)

        def step() -> object:
            nonlocal following
            ids_T1 = ((each_T + following) % max(1, num_held))[:, None]
            following += num_timed
            return compute(RoutedBatch(x_TD, ids_T1, weights_T1), torch.float32)

        return step

    def seconds(action: Callable[[], object], unit: float = 1.0, works: bool = True) -> float:
        """The median over rounds of the slowest rank's time, each divided by the rank's own unit.

        works: whether this rank does it too; those that do not, rest.
        """
        if works:
            action()
        samples = []
        for _ in range(_ROUNDS):
            ranks.exchange(torch.zeros(1, dtype=torch.int32))  # a barrier
            samples.append(_timed(action, device) / unit if works else 0.0)
        slowest: list[float] = [max(by_rank) for by_rank in zip(*ranks.agree(samples), strict=True)]
        return statistics.median(slowest)

    row_bytes = 4 * d_model
    sizes = [max(1 + i, num_bytes // (W * row_bytes)) for i, num_bytes in enumerate(GATHERED_BYTES)]
    moved_bytes = [max(1, W - 1) * num * row_bytes for num in sizes]
    gather_s, swap_s, sum_s = (
        fit_alpha_beta(moved_bytes, [seconds(kind(num)) for num in sizes]) for kind in (gather, swap, total)
    )
    held = num_timed * held_share
    expert_s = alone_s = fit_alpha_beta(TOKENS, [seconds(experts(num), held) for num in TOKENS])
    if len(set(ranks.machine_W)) < W:
        is_first = ranks.machine_W[ranks.rank] == ranks.rank
        alone_s = fit_alpha_beta(TOKENS, [seconds(experts(num), held, is_first) for num in TOKENS])
    link_s, compute_s = seconds(gather(sizes[-1])), seconds(experts(TOKENS[-1]))
    computing = _overlap(ranks, compute_s, link_s, experts(TOKENS[-1]), rows(sizes[-1]), seconds)
    cost = RankedCost(
        gather=gather_s,
        swap=swap_s,
        sum=sum_s,
        expert=expert_s,
        alone=alone_s,
        machine_W=ranks.machine_W,
        share_W=tuple(share_W),
        first_expert_W1=first_expert_W1,
        d_model=d_model,
        act_bytes_per_value=dtype.itemsize,
        computing=computing,
    )
    first: RankedCost = ranks.agree(cost)[0]
    return first


def _overlap(
    ranks: RankGroup,
    compute_s: float,
    link_s: float,
    computing: Callable[[], object],
    mine_ND: Tensor,
    seconds: Callable[[Callable[[], object]], float],
) -> Overlap:
    """As many rounds of the shorter as fill the longer, both at once, against each alone."""
    num_compute = min(64, max(1, round(link_s / compute_s)))
    num_link = min(4, max(1, round(compute_s / link_s)))

    def both() -> None:
        counts_W = [len(mine_ND)] * ranks.size
        pending = [gather_rows(ranks, mine_ND, counts_W) for _ in range(num_link)]
        for _ in range(num_compute):
            computing()
        for rows in pending:
            rows.wait()

    alone_s = max(num_compute * compute_s, num_link * link_s)
    # One factor for both: they were made to take about as long. Two is one after the other.
    factor = min(2.0, max(1.0, seconds(both) / alone_s))
    return Overlap(factor, factor)


def _timed(action: Callable[[], object], device: torch.device) -> float:
    start_s = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s
