"""Experts over ranks: who holds what, and per batch whether tokens travel to whole experts or everybody computes slices.

    sharded   gather rows, compute a slice of every expert, sum at the owners; in C chunks that overlap:
              g + (C - 1) max'(x, g + s) + x + s,  of one chunk: g gather, x compute, s sum; max' is `overlapped_s`
    peers     rows there + the fullest rank's experts + rows back

    x of a chunk = max over ranks of share_W * sum over E of expert(pairs_E / C): no rank has more than its share of F
    of the peers   = max over ranks of sum over its own experts of expert(pairs_E): the skew decides

Everything is computed from sizes that every rank knows, and sums over experts are rounded once (fsum), so that ranks
with other processors, which would add in another order, decide alike. W ranks, E experts, C chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from monde.planning.cost import overlapped_s
from monde.planning.fit import AlphaBeta
from monde.planning.profile import Overlap

PANEL = 16  # rows of F that the kernels take at once: a cut elsewhere pads both sides
NUM_CHUNKS = (1, 2, 4, 8, 16)
ROUTING_WORDS = 1024  # 4 KiB a rank with the sizes: a Gloo exchange takes as long with as without
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
    expert: seconds of one whole expert by its tokens; alpha_s reads its weights. share_W: of F, by rank.
    first_expert_W1: rank w owns experts from [w] to [w + 1]. computing: how much compute and the links slow each other.
    """

    gather: AlphaBeta
    swap: AlphaBeta
    sum: AlphaBeta
    expert: AlphaBeta
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


def plan_batch(counts: RankedCounts, cost: RankedCost, ways: Sequence[Way] = tuple(Way)) -> BatchPlan:
    """The way and the number of chunks with the fewest predicted seconds, of the ways that the ranks can go."""
    sharded = {num_chunks: sharded_s(counts, cost, num_chunks) for num_chunks in NUM_CHUNKS}
    num_chunks = min(sharded, key=lambda c: sharded[c])
    there_s = peers_s(counts, cost)
    peers = Way.SHARDED not in ways or (Way.PEERS in ways and there_s < sharded[num_chunks])
    way = Way.PEERS if peers else Way.SHARDED
    return BatchPlan(way, num_chunks, sharded[num_chunks], there_s, rank_imbalance(counts, cost))


def sharded_s(counts: RankedCounts, cost: RankedCost, num_chunks: int) -> float:
    """Predicted seconds of a layer cut along F."""
    tokens_W = np.asarray(counts.num_tokens_W, np.float64) / num_chunks
    # What comes in is everybody else's rows; what goes out, its own to everybody else. Sums go the other way.
    busiest = float(max((tokens_W.sum() - tokens_W).max(), (tokens_W * (len(tokens_W) - 1)).max()))
    g = 0.0
    if not counts.is_everywhere:
        g = float(cost.gather.seconds(busiest * cost.d_model * cost.act_bytes_per_value))
    s = float(cost.sum.seconds(busiest * cost.d_model * _FP32_BYTES))
    x = max(cost.share_W) * math.fsum(_experts_s(np.asarray(counts.pairs_E) / num_chunks, cost.expert))
    routing_s = 0.0
    if not (counts.is_everywhere or counts.routing_fits_header):
        routing_s = float(cost.gather.seconds(busiest * num_chunks * 2 * counts.num_topk * _FP32_BYTES))
    return routing_s + pipeline_s(g, x, s, num_chunks, cost.computing)


def pipeline_s(g: float, x: float, s: float, num_chunks: int, computing: Overlap) -> float:
    """Chunks that arrive in g, are computed in x and leave in s, g and s on one link."""
    return g + (num_chunks - 1) * float(overlapped_s(x, g + s, computing)) + x + s


def peers_s(counts: RankedCounts, cost: RankedCost) -> float:
    """Predicted seconds of a layer whose whole experts are spread over the ranks."""
    rows_WW = np.asarray(counts.rows_WW, np.float64)
    away_WW = rows_WW - np.diag(np.diag(rows_WW))
    busiest = float(max(away_WW.sum(axis=0).max(), away_WW.sum(axis=1).max()))
    there_bytes = busiest * cost.d_model * cost.act_bytes_per_value
    routing_bytes = busiest * 2 * counts.num_topk * _FP32_BYTES
    moved_s = cost.swap.seconds(there_bytes) + cost.swap.seconds(routing_bytes)
    moved_s += cost.swap.seconds(busiest * cost.d_model * _FP32_BYTES)
    return float(moved_s) + max(_by_rank(_experts_s(np.asarray(counts.pairs_E), cost.expert), cost))


def rank_imbalance(counts: RankedCounts, cost: RankedCost) -> float:
    """rho: pairs of the fullest rank over the mean; 1 for a batch of none."""
    pairs_W = _by_rank(np.asarray(counts.pairs_E, np.float64), cost)
    return max(pairs_W) / (sum(pairs_W) / len(pairs_W)) if any(pairs_W) else 1.0


def _experts_s(pairs_E: NDArray[np.float64], expert: AlphaBeta) -> NDArray[np.float64]:
    """Seconds by expert; of one with less than a token a chunk, only that share of the chunks reads the weights."""
    return expert.alpha_s * np.minimum(pairs_E, 1) + expert.s_per_unit * pairs_E


def _by_rank(values_E: NDArray[np.float64], cost: RankedCost) -> list[float]:
    return [math.fsum(values_E[first:end]) for first, end in pairwise(cost.first_expert_W1)]
