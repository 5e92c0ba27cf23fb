"""MoEShard's evaluation at its testbed, 4x A100-80GB over NVLink, in the event simulator: layers and whole encoders.

Assumed, none of it fitted (docs/sharding-evaluation.md puts the result next to what the paper's authors measured):

- Arithmetic: `GEMM_SHARE` of 156 TFLOP/s. The authors' containers multiply fp32 in TF32 by default, and their DeepSpeed
  layers compute 81 TFLOP/s, four times what fp32 could. Fewer than 128 rows leave tiles partly empty, as in machines.py.
- Memory: 80% of 2039 GB/s. NVLink: 80% of 300 GB/s each way, 20 us a collective. What computes beside a collective,
  and the collective, take 1.19 times as long (mean of arXiv 2507.03114, also in training_layers.py).
- Eager kernels follow each other after 10 us at least; a dense block takes `EAGER_BLOCK_S` at least.
- DeepSpeed: per expert two products and a ReLU in kernels of their own, chunks made contiguous before and joined after.
- monde: grouped kernels with the activation inside; `PROMPT_LAUNCHES` a layer for planning and launching as measured on
  our GPU machine, and an exchange of sizes over Gloo, both with the GPU idle. Dropless expert parallelism has them too.

W ranks, T tokens a rank, E experts, C rows of an expert and rank (padded), N rows of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bench.moeshard import (
    D_FFN,
    D_MODEL,
    NUM_BLOCKS,
    NUM_HEADS,
    NUM_MOE,
    SEQUENCE,
    capacity,
    capacity_factor,
)
from monde.planning.fit import AlphaBeta
from monde.planning.machines import EAGER_BLOCK_S, PROMPT_LAUNCHES
from monde.planning.profile import Curve, Overlap
from monde.planning.schedule import Resource, ScheduleBuilder
from monde.planning.sharding import BatchPlan, RankedCost, RankedCounts, Way, assign_experts, plan_batch
from monde.planning.simulate import simulate

NUM_RANKS = 4
TF32_FLOPS_PER_S, GEMM_SHARE = 156e12, 0.7
SIZES_S = 0.3e-3  # Gloo's all-gather of sizes, ranks of one machine
_HOST_S = PROMPT_LAUNCHES.plan_s + PROMPT_LAUNCHES.layer_s + SIZES_S
VALUE_BYTES = 4
ROW_BYTES = D_MODEL * VALUE_BYTES
EXPERT_BYTES = 2 * D_MODEL * D_FFN * VALUE_BYTES
EXPERT_FLOPS = 4 * D_MODEL * D_FFN  # of a row
_TILES = Curve((1, 16, 128), (0.02, 0.25, 1.0))
_BESIDE = Overlap(1.19, 1.19)
_CONTENTION = {(Resource.GPU, Resource.LINK_INTRA): _BESIDE}


@dataclass(frozen=True)
class Gpu:
    """Rates that products, memory and links reach; `tiles` over rows of an expert."""

    flops_per_s: float = TF32_FLOPS_PER_S * GEMM_SHARE
    bytes_per_s: float = 2039e9 * 0.8
    link_bytes_per_s: float = 300e9 * 0.8
    collective_s: float = 20e-6
    kernel_s: float = 10e-6
    tiles: Curve = _TILES

    def eager_s(self, flops: float, num_bytes: float) -> float:
        """One kernel of many rows."""
        return max(self.kernel_s, flops / self.flops_per_s, num_bytes / self.bytes_per_s)

    def grouped_s(self, rows_E: NDArray[np.float64], f_share: float) -> float:
        """Both products of a share of F of many experts, two kernels."""
        rows_E = rows_E[rows_E > 0]
        flops_s = f_share * EXPERT_FLOPS * rows_E / (self.flops_per_s * self.tiles.at(rows_E))
        moved_bytes = f_share * EXPERT_BYTES + rows_E * (2 * ROW_BYTES + f_share * 2 * D_FFN * VALUE_BYTES)
        return 2 * self.kernel_s + float(np.maximum(flops_s, moved_bytes / self.bytes_per_s).sum())

    def collective(self, num_bytes: float) -> float:
        """num_bytes in or out of the busiest rank."""
        return self.collective_s + num_bytes / self.link_bytes_per_s


@dataclass(frozen=True)
class Layer:
    """One batch at one layer: pairs_WE tokens of every rank by expert, top-1, the same number on all ranks."""

    gpu: Gpu
    pairs_WE: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        return int(self.pairs_WE[0].sum())

    @property
    def rows_E(self) -> NDArray[np.float64]:
        return np.asarray(self.pairs_WE.sum(axis=0), np.float64)

    @property
    def first_expert_W1(self) -> tuple[int, ...]:
        return assign_experts(self.pairs_WE.shape[1], NUM_RANKS)

    @property
    def rows_WW(self) -> NDArray[np.int64]:
        """Tokens of each rank for whole experts of each."""
        return np.stack(
            [self.pairs_WE[:, a:b].sum(axis=1) for a, b in pairwise(self.first_expert_W1)], axis=1
        )

    @property
    def capacity(self) -> int:
        num_experts = self.pairs_WE.shape[1]
        return capacity(self.num_tokens, num_experts, capacity_factor(num_experts))

    @property
    def num_dropped(self) -> int:
        """Tokens beyond a padded buffer, on all ranks."""
        return int(np.maximum(self.pairs_WE - self.capacity, 0).sum())

    # ---- contenders: seconds of the layer ----
    def padded_s(self) -> float:
        """DeepSpeed as the paper configures it."""
        gpu, num_experts = self.gpu, self.pairs_WE.shape[1]
        one_expert = NUM_RANKS * self.capacity
        rows = one_expert * num_experts // NUM_RANKS  # of all buffers of a rank
        buffer_bytes = rows * ROW_BYTES
        there_s = gpu.collective(buffer_bytes * (NUM_RANKS - 1) / NUM_RANKS)
        dispatch_s = gpu.eager_s(0, buffer_bytes) + gpu.eager_s(0, 2 * self.num_tokens * ROW_BYTES)
        hidden_bytes = one_expert * D_FFN * VALUE_BYTES
        product_s = gpu.eager_s(
            one_expert * EXPERT_FLOPS / 2, one_expert * ROW_BYTES + hidden_bytes + EXPERT_BYTES / 2
        )
        copy_s = gpu.eager_s(0, 2 * one_expert * ROW_BYTES)
        expert_s = 2 * product_s + gpu.eager_s(0, 2 * hidden_bytes) + 2 * copy_s
        return dispatch_s + 2 * there_s + num_experts / NUM_RANKS * expert_s + dispatch_s

    def peers_s(self) -> float:
        """Dropless expert parallelism: uneven all-to-alls, the fullest rank's experts."""
        away_WW = self.rows_WW - np.diag(np.diag(self.rows_WW))
        busiest_bytes = ROW_BYTES * float(max(away_WW.sum(axis=0).max(), away_WW.sum(axis=1).max()))
        compute_s = max(self.gpu.grouped_s(self.rows_E[a:b], 1.0) for a, b in pairwise(self.first_expert_W1))
        ordered_s = 2 * self.gpu.eager_s(0, 2 * self.num_tokens * ROW_BYTES)  # rows by rank, and back
        # The routing's words are an exchange of their own: bytes of next to nothing.
        moved_s = 2 * self.gpu.collective(busiest_bytes) + self.gpu.collective(0)
        return _HOST_S + ordered_s + moved_s + compute_s

    def sharded_s(self, num_chunks: int) -> float:
        """The sharded executor's order of issue: gather c + 1, compute c, sum c."""
        away_bytes = (NUM_RANKS - 1) * self.num_tokens * ROW_BYTES / num_chunks
        moved_s = self.gpu.collective(away_bytes)
        compute_s = self.gpu.grouped_s(self.rows_E / num_chunks, 1 / NUM_RANKS)
        tasks = ScheduleBuilder()
        start = tasks.add("sizes, plan, launches", Resource.GPU, _HOST_S)
        words = tasks.add("routing", Resource.LINK_INTRA, self.gpu.collective(0), [start])
        gathered = [tasks.add("gather", Resource.LINK_INTRA, moved_s, [words])]
        for c in range(num_chunks):
            if c + 1 < num_chunks:
                gathered.append(tasks.add("gather", Resource.LINK_INTRA, moved_s))
            computed = tasks.add("experts", Resource.GPU, compute_s, [gathered[c]])
            tasks.add("sum", Resource.LINK_INTRA, moved_s, [computed])
        return simulate(tasks.build(), _CONTENTION).makespan_s

    # ---- the planner's view ----
    def plan(self) -> BatchPlan:
        """What monde.planning.sharding chooses from two numbers of an expert and of the links, as at run time."""
        rows = tuple(map(tuple, self.rows_WW.tolist()))
        pairs_E = tuple(int(n) for n in self.rows_E)
        return plan_batch(RankedCounts((self.num_tokens,) * NUM_RANKS, rows, pairs_E, 1), self._cost())

    def planned_s(self, plan: BatchPlan) -> float:
        return self.peers_s() if plan.way is Way.PEERS else self.sharded_s(plan.num_chunks)

    def _cost(self) -> RankedCost:
        link = AlphaBeta(self.gpu.collective_s, 1 / self.gpu.link_bytes_per_s)
        expert = AlphaBeta(EXPERT_BYTES / self.gpu.bytes_per_s, EXPERT_FLOPS / self.gpu.flops_per_s)
        shares = (1 / NUM_RANKS,) * NUM_RANKS
        return RankedCost(
            gather=link, swap=link, sum=link, expert=expert,
            alone=expert, machine_W=tuple(range(NUM_RANKS)),  # each has a GPU of its own
            share_W=shares, first_expert_W1=self.first_expert_W1,
            d_model=D_MODEL, act_bytes_per_value=VALUE_BYTES, computing=_BESIDE,
        )  # fmt: skip


def imbalance(rows_W: ArrayLike) -> float:
    """Work of the fullest rank over the mean."""
    return float(np.max(rows_W) / np.mean(rows_W))


def dense_s(gpu: Gpu, num_tokens: int) -> float:
    """All blocks without their experts, on one rank: attention as eager transformers computes it, six plain FFNs."""
    T, D = num_tokens, D_MODEL
    row_bytes, scores_bytes = T * ROW_BYTES, T * NUM_HEADS * SEQUENCE * VALUE_BYTES
    projections_s = 4 * gpu.eager_s(2 * T * D * D, 2 * row_bytes)
    products_s = 2 * gpu.eager_s(2 * T * SEQUENCE * D, 2 * row_bytes + scores_bytes)
    # Position bias and mask added, softmax, dropout left out: three passes that read and write all scores.
    scores_s = 3 * gpu.eager_s(0, 2 * scores_bytes)
    # Heads split and joined (4), two norms of three passes each, two residual sums of three.
    rows_s = (
        4 * gpu.eager_s(0, 2 * row_bytes)
        + 6 * gpu.eager_s(0, 2 * row_bytes)
        + 2 * gpu.eager_s(0, 3 * row_bytes)
    )
    hidden_bytes = T * D_FFN * VALUE_BYTES
    ffn_s = 2 * gpu.eager_s(2 * T * D * D_FFN, row_bytes + hidden_bytes) + gpu.eager_s(0, 2 * hidden_bytes)
    block_s = projections_s + products_s + scores_s + rows_s
    num_plain = NUM_BLOCKS - NUM_MOE
    return num_plain * max(EAGER_BLOCK_S, block_s + ffn_s) + NUM_MOE * max(EAGER_BLOCK_S, block_s)


def encoder_s(gpu: Gpu, num_tokens: int, layer_s: float) -> float:
    """One pass: time to the first token of an encoder."""
    return dense_s(gpu, num_tokens) + NUM_MOE * layer_s
