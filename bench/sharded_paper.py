"""MoEShard's evaluation in the planner's own formulas, at its testbed: four A100-80GB over NVLink, Switch-Base's encoder.

Everything assumed is in A100, Encoder and docs/sharding.md. TTFT is one pass of the encoder. W ranks, E experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.padded_ep import capacity, paper_factor
from monde.planning.fit import AlphaBeta
from monde.planning.profile import Overlap
from monde.planning.sharding import (
    RankedCost,
    RankedCounts,
    assign_experts,
    peers_s,
    plan_batch,
    rank_imbalance,
    sharded_s,
)

NUM_RANKS = 4
EXPERTS = (8, 16, 32, 64, 128, 256)
BATCHES = (10, 50, 250, 450)
SKEWED_SHARE, SKEWED_EXPERTS = 0.6, 0.1
# What the paper reports over DeepSpeed at batch 250, by E.
PAPER_SPEEDUP = {8: 2.35, 16: 3.73, 32: 5.91, 64: 6.45, 128: 4.06, 256: 2.39}


@dataclass(frozen=True)
class A100:
    """Assumptions. Rates are data sheets' times what large matrices and messages are usually seen to reach."""

    fp32_flops_per_s: float = 19.5e12 * 0.75
    hbm_bytes_per_s: float = 2.0e12 * 0.8
    link_bytes_per_s: float = 300e9 * 0.75  # one way, NVLink 3
    collective_s: float = 25e-6
    expert_launch_s: float = 3e-6  # an expert's share of a grouped kernel
    kernel_launch_s: float = 10e-6
    while_communicating: float = 1.1  # collectives take some of the processors


@dataclass(frozen=True)
class Encoder:
    """Switch-Base: 12 blocks, every second one with experts instead of its FFN; fp32 as in the paper."""

    d_model: int = 768
    d_ffn: int = 3072
    num_blocks: int = 12
    num_moe: int = 6
    sequence: int = 120
    bytes_per_value: int = 4

    @property
    def ffn_flops(self) -> float:
        """Of a token."""
        return 4.0 * self.d_model * self.d_ffn


def router_E(num_experts: int, share: float) -> NDArray[np.float64]:
    """The paper's router: `share` of the tokens go to the first tenth of the experts, the rest everywhere."""
    num_hot = max(1, round(SKEWED_EXPERTS * num_experts))
    p_E = np.full(num_experts, (1 - share) / num_experts)
    p_E[:num_hot] += share / num_hot
    return p_E


def cost_of(machine: A100, encoder: Encoder, num_experts: int) -> RankedCost:
    weights_bytes = 2 * encoder.d_model * encoder.d_ffn * encoder.bytes_per_value
    link = AlphaBeta(machine.collective_s, 1 / machine.link_bytes_per_s)
    slow = machine.while_communicating
    return RankedCost(
        gather=link,
        swap=link,
        sum=link,
        expert=AlphaBeta(
            machine.expert_launch_s + weights_bytes / machine.hbm_bytes_per_s,
            encoder.ffn_flops / machine.fp32_flops_per_s,
        ),
        share_W=(1 / NUM_RANKS,) * NUM_RANKS,
        first_expert_W1=assign_experts(num_experts, NUM_RANKS),
        d_model=encoder.d_model,
        act_bytes_per_value=encoder.bytes_per_value,
        computing=Overlap(slow, slow),
    )


def counts_of(num_tokens: int, p_E: NDArray[np.float64], cost: RankedCost) -> RankedCounts:
    """num_tokens on every rank, top-1, routed as expected."""
    ends = np.concatenate(([0.0], np.cumsum(p_E)))
    rows_W = np.rint(num_tokens * np.diff(ends[list(cost.first_expert_W1)])).astype(int)
    pairs_E = np.rint(NUM_RANKS * num_tokens * p_E).astype(int)
    return RankedCounts(
        (num_tokens,) * NUM_RANKS, (tuple(rows_W.tolist()),) * NUM_RANKS, tuple(pairs_E.tolist()), 1
    )


def dense_s(machine: A100, encoder: Encoder, num_tokens: int) -> float:
    """Attention of all blocks and the FFNs of those without experts."""
    attention = encoder.num_blocks * (8 * encoder.d_model**2 + 4 * encoder.sequence * encoder.d_model)
    ffns = (encoder.num_blocks - encoder.num_moe) * encoder.ffn_flops
    return (
        num_tokens * (attention + ffns) / machine.fp32_flops_per_s
        + 10 * encoder.num_blocks * machine.kernel_launch_s
    )


def padded_s(machine: A100, encoder: Encoder, num_tokens: int, num_experts: int) -> float:
    """One layer of expert parallelism with DeepSpeed's buffers: every row of every buffer moves and is computed."""
    rows = num_experts * capacity(num_tokens, num_experts, paper_factor(num_experts))
    row_bytes = encoder.d_model * encoder.bytes_per_value
    move_s = machine.collective_s + rows * (NUM_RANKS - 1) / NUM_RANKS * row_bytes / machine.link_bytes_per_s
    weights_bytes = 2 * encoder.d_model * encoder.d_ffn * encoder.bytes_per_value
    read_s = num_experts / NUM_RANKS * (2 * machine.kernel_launch_s + weights_bytes / machine.hbm_bytes_per_s)
    return 2 * move_s + read_s + rows * encoder.ffn_flops / machine.fp32_flops_per_s


def simulate() -> dict[str, Any]:
    """Every E, batch and router: seconds of a layer by each way, and of the encoder."""
    machine, encoder = A100(), Encoder()
    rows = []
    for num_experts in EXPERTS:
        cost = cost_of(machine, encoder, num_experts)
        for batch in BATCHES:
            num_tokens = batch * encoder.sequence
            rest_s = dense_s(machine, encoder, num_tokens)
            for share in (0.0, SKEWED_SHARE):
                counts = counts_of(num_tokens, router_E(num_experts, share), cost)
                plan = plan_batch(counts, cost)
                ours_s = min(plan.sharded_s, plan.peers_s)
                padded = padded_s(machine, encoder, num_tokens, num_experts)

                def ttft_s(layer_s: float, rest_s: float = rest_s) -> float:
                    return rest_s + encoder.num_moe * layer_s

                rows.append(
                    {
                        "num_experts": num_experts,
                        "batch": batch,
                        "skew": share,
                        "way": plan.way.value,
                        "num_chunks": plan.num_chunks,
                        "rho": rank_imbalance(counts, cost),
                        "layer_s": {
                            "ours": ours_s,
                            "sharded": plan.sharded_s,
                            "sharded, 1 chunk": sharded_s(counts, cost, 1),
                            "dropless peers": peers_s(counts, cost),
                            "padded": padded,
                        },
                        "ttft_over_padded": ttft_s(padded) / ttft_s(ours_s),
                        "ttft_over_dropless": ttft_s(plan.peers_s) / ttft_s(ours_s),
                        "paper_over_deepspeed": PAPER_SPEEDUP.get(num_experts) if batch == 250 else None,
                    }
                )
    return {"machine": asdict(machine), "encoder": asdict(encoder), "rows": rows}


def table(rows: list[dict[str, Any]], batch: int) -> str:
    """One batch size as markdown."""
    lines = [
        "| E | skew | rho | way | over padded EP | over dropless EP | paper, over DeepSpeed |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        if row["batch"] == batch:
            paper = (
                f"{row['paper_over_deepspeed']:.2f}x" if row["paper_over_deepspeed"] and row["skew"] else ""
            )
            lines.append(
                f"| {row['num_experts']} | {row['skew']} | {row['rho']:.2f} | {row['way']}, {row['num_chunks']} chunks | "
                f"{row['ttft_over_padded']:.2f}x | {row['ttft_over_dropless']:.2f}x | {paper} |"
            )
    return "\n".join(lines)
