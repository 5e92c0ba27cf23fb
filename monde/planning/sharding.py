"""Experts over ranks: who holds what, and per batch whether tokens travel to whole experts or everybody computes slices.

    sharded   gather rows, compute a slice of every expert, sum at the owners; in C chunks that overlap:
              g + (C - 1) max'(x, g + s) + x + s,  of one chunk: g gather, x compute, s sum; max' is `overlapped_s`
    peers     rows there + the fullest rank's experts + rows back

    x of a chunk = max over ranks of share_W * sum over E of expert(pairs_E / C): no rank has more than its share of F
    of the peers   = max over ranks of sum over its own experts of expert(pairs_E): the skew decides. Of ranks that
                     share a machine's memory and cores, those that are still busy share what the others leave

Everything is computed from sizes that every rank knows. Sums over experts are of whole numbers, the rest is a few
scalar operations in one order, so that ranks with different processors decide alike; a plan takes tens of
microseconds, of layers that take a few milliseconds. W ranks, E experts, C chunks, P pairs of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from monde.planning.cost import overlapped_s
from monde.planning.fit import AlphaBeta
from monde.planning.profile import Overlap

PANEL = 16  # rows of F that the kernels take at once: a cut elsewhere pads both sides
NUM_CHUNKS = (1, 2, 4, 8, 16)
ROUTING_WORDS = 1024  # 4 KiB a rank with the sizes: a Gloo exchange takes as long with as without
MARGIN = 0.05  # predictions are off by more, so a smaller gain is not one
_FP32_BYTES = 4


class Way(StrEnum):
    SHARDED = "sharded"
    PEERS = "peers"


@dataclass(frozen=True)
class RankedCounts:
    """Sizes of one layer's batch on all ranks: the same record on each of them.

    rows_WW[w][v]: tokens of rank w with an expert of rank v, were whole experts spread over the ranks.
    pairs_E: routed pairs of all ranks by expert. num_topk K. is_everywhere: every rank has the rows of all already.
    """

    num_tokens_W: tuple[int, ...]
    rows_WW: tuple[tuple[int, ...], ...]
    pairs_E: tuple[int, ...]
    num_topk: int
    is_everywhere: bool = False

    @property
    def routing_fits_header(self) -> bool:
        """Whether ids and weights travel with the sizes."""
        return max(self.num_tokens_W) * 2 * self.num_topk <= ROUTING_WORDS


@dataclass(frozen=True)
class RankedCost:
    """What things take on these ranks, of the slowest where they differ.

    gather, swap, sum: seconds by bytes in or out of the busiest rank, its own not counted.
    expert: seconds of one whole expert by its tokens, all ranks at work; alpha_s reads its weights. alone: the same
    where one rank of a machine works and the others rest. machine_W: which ranks share one. share_W: of F, by rank.
    first_expert_W1: rank w owns experts from [w] to [w + 1]. computing: how much compute and the links slow each other.
    """

    gather: AlphaBeta
    swap: AlphaBeta
    sum: AlphaBeta
    expert: AlphaBeta
    alone: AlphaBeta
    machine_W: tuple[int, ...]
    share_W: tuple[float, ...]
    first_expert_W1: tuple[int, ...]
    d_model: int
    act_bytes_per_value: int
    computing: Overlap


@dataclass(frozen=True)
class BatchPlan:
    """What to do with a batch and why. rho: the fullest rank's pairs over the mean, were whole experts spread."""

    way: Way
    num_chunks: int
    sharded_s: float
    peers_s: float
    rho: float


@dataclass(frozen=True)
class WayFactors:
    """Measured over predicted seconds of recent steps, by way; 1 where nothing is known."""

    sharded: float = 1.0
    peers: float = 1.0


def cut_ffn(d_ffn: int, share_W: Sequence[float]) -> tuple[int, ...]:
    """Rank w holds rows [w] to [w + 1] of F: as close to its share as whole panels allow, at least one row.

    Errors: ValueError for shares that are not positive, and for more ranks than rows.
    """
    if not all(share > 0 for share in share_W):
        raise ValueError(f"mesh_shares: expected numbers above 0, one for each rank, got {list(share_W)}")
    if len(share_W) > d_ffn:
        raise ValueError(
            f'mesh: {len(share_W)} ranks cannot cut experts of F={d_ffn}; use fewer ranks or parallel="peers"'
        )
    ends = np.cumsum(share_W) / np.sum(share_W) * d_ffn
    unit = PANEL if min(share_W) / sum(share_W) * d_ffn >= 2 * PANEL else 1
    cuts = [0]
    for w, end in enumerate(ends[:-1]):
        most = d_ffn - (len(share_W) - 1 - w)  # a row for everybody after
        cuts.append(min(max(round(end / unit) * unit, cuts[-1] + 1), most))
    return (*cuts, d_ffn)


def assign_experts(num_experts: int, num_ranks: int) -> tuple[int, ...]:
    """Rank w owns experts [w] to [w + 1]; numbers differ by one at most, and may be 0."""
    return tuple(num_experts * w // num_ranks for w in range(num_ranks + 1))


def plan_batch(
    counts: RankedCounts,
    cost: RankedCost,
    ways: Sequence[Way] = tuple(Way),
    factors: WayFactors = WayFactors(),
) -> BatchPlan:
    """The way and the number of chunks with the fewest predicted seconds, of the ways that the ranks can go.

    Whole experts, where they can be had, are left for a gain above MARGIN only. factors scale what `cost` predicts.
    """
    pairs_E = np.asarray(counts.pairs_E, np.int64)
    chunked_s = _sharded_s(counts, cost, pairs_E, NUM_CHUNKS)
    num_chunks = min(chunked_s, key=lambda c: chunked_s[c])
    sharded_s = chunked_s[num_chunks] * factors.sharded
    there_s = _peers_s(counts, cost, pairs_E) * factors.peers
    peers = Way.SHARDED not in ways or (Way.PEERS in ways and (1 - MARGIN) * there_s <= sharded_s)
    way = Way.PEERS if peers else Way.SHARDED
    return BatchPlan(way, num_chunks, sharded_s, there_s, _imbalance(_by_rank(pairs_E, cost)))


def sharded_s(counts: RankedCounts, cost: RankedCost, num_chunks: int) -> float:
    """Predicted seconds of a layer cut along F."""
    return _sharded_s(counts, cost, np.asarray(counts.pairs_E, np.int64), (num_chunks,))[num_chunks]


def _sharded_s(
    counts: RankedCounts, cost: RankedCost, pairs_E: NDArray[np.int64], num_chunks: Sequence[int]
) -> dict[int, float]:
    """By number of chunks; those whose compute alone takes longer than an earlier one's whole layer are left out."""
    # What comes in is everybody else's rows; what goes out, its own to everybody else. Sums go the other way.
    total, W = sum(counts.num_tokens_W), len(counts.num_tokens_W)
    busiest = max(total - min(counts.num_tokens_W), max(counts.num_tokens_W) * (W - 1))
    routing_s = 0.0
    if not (counts.is_everywhere or counts.routing_fits_header):
        routing_s = _s(cost.gather, busiest * 2 * counts.num_topk * _FP32_BYTES)
    # An expert with fewer pairs than chunks has its weights read in as many of them as it has pairs.
    most = max(NUM_CHUNKS)
    experts_P = np.bincount(np.minimum(pairs_E, most), minlength=most + 1).tolist()
    num_pairs = int(pairs_E.sum())
    seconds: dict[int, float] = {}
    for C in num_chunks:
        reads = sum(min(p, C) * num for p, num in enumerate(experts_P)) / C
        x = max(cost.share_W) * (cost.expert.alpha_s * reads + cost.expert.s_per_unit * num_pairs / C)
        chunk_values = busiest * cost.d_model / C
        g = 0.0 if counts.is_everywhere else _s(cost.gather, chunk_values * cost.act_bytes_per_value)
        s = _s(cost.sum, chunk_values * _FP32_BYTES)
        if seconds and routing_s + g + C * x + s >= min(seconds.values()):
            continue
        seconds[C] = routing_s + pipeline_s(g, x, s, C, cost.computing)
    return seconds


def pipeline_s(g: float, x: float, s: float, num_chunks: int, computing: Overlap) -> float:
    """Chunks that arrive in g, are computed in x and leave in s, g and s on one link."""
    between = overlapped_s(x, g + s, computing) if num_chunks > 1 else 0.0
    return g + (num_chunks - 1) * between + x + s


def peers_s(counts: RankedCounts, cost: RankedCost) -> float:
    """Predicted seconds of a layer whose whole experts are spread over the ranks."""
    return _peers_s(counts, cost, np.asarray(counts.pairs_E, np.int64))


def _peers_s(counts: RankedCounts, cost: RankedCost, pairs_E: NDArray[np.int64]) -> float:
    out_W = [sum(to_W) - to_W[w] for w, to_W in enumerate(counts.rows_WW)]
    in_W = [sum(column) - column[w] for w, column in enumerate(zip(*counts.rows_WW, strict=True))]
    busiest = max(*out_W, *in_W)
    moved_s = _s(cost.swap, busiest * cost.d_model * cost.act_bytes_per_value)
    moved_s += _s(cost.swap, busiest * 2 * counts.num_topk * _FP32_BYTES)
    moved_s += _s(cost.swap, busiest * cost.d_model * _FP32_BYTES)
    load = list(zip(_by_rank(np.minimum(pairs_E, 1), cost), _by_rank(pairs_E, cost), strict=True))
    together_W = [cost.expert.alpha_s * reads + cost.expert.s_per_unit * pairs for reads, pairs in load]
    alone_W = [cost.alone.alpha_s * reads + cost.alone.s_per_unit * pairs for reads, pairs in load]
    machines: dict[int, list[int]] = {}
    for w, machine in enumerate(cost.machine_W):
        machines.setdefault(machine, []).append(w)
    return moved_s + max(
        shared_machine_s([together_W[w] for w in there], [alone_W[w] for w in there])
        for there in machines.values()
    )


def shared_machine_s(together_M: Sequence[float], alone_M: Sequence[float]) -> float:
    """Seconds until the last of M ranks of one machine is done, by what each takes beside all the others and alone.

    A rank speeds up with those that finish, by as much as they leave to each of the rest, up to its speed alone.
    """
    # In order of what is left; a rank's rate is 1 beside all others.
    waiting = sorted((x, max(1.0, x / a)) for x, a in zip(together_M, alone_M, strict=True) if min(x, a) > 0)
    now_s, left = 0.0, [x for x, _ in waiting]
    busy = list(range(len(waiting)))
    while busy:
        rate = {i: min(waiting[i][1], len(together_M) / len(busy)) for i in busy}
        step_s = min(left[i] / rate[i] for i in busy)
        now_s += step_s
        ended = [i for i in busy if left[i] / rate[i] <= step_s]
        for i in busy:
            left[i] -= step_s * rate[i]
        busy = [i for i in busy if i not in ended]
    return now_s


def rank_imbalance(counts: RankedCounts, cost: RankedCost) -> float:
    """rho: pairs of the fullest rank over the mean; 1 for a batch of none."""
    return _imbalance(_by_rank(np.asarray(counts.pairs_E, np.int64), cost))


def _imbalance(pairs_W: Sequence[int]) -> float:
    return max(pairs_W) * len(pairs_W) / sum(pairs_W) if any(pairs_W) else 1.0


def _s(fit: AlphaBeta, size: float) -> float:
    return float(fit.seconds(size))


def _by_rank(values_E: NDArray[np.int64], cost: RankedCost) -> list[int]:
    ends_E1 = np.concatenate(([0], np.cumsum(values_E)))
    return np.diff(ends_E1[list(cost.first_expert_W1)]).tolist()  # type: ignore[no-any-return]
