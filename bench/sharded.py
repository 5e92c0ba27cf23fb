"""Experts over ranks, one MoE layer of Switch-Base's encoder: slices, whole experts, and padded capacities.

    python -m bench.sharded simulate                                     # at the paper's testbed, by formulas
    torchrun --nproc-per-node 2 -m bench.sharded measure --experts 8 64  # here, over Gloo

Contenders take turns, round by round, after a check that they give one answer. A round's time is the slowest rank's.
fp32, top-1, ReLU, D=768, F=3072. W ranks, T tokens a rank, E experts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from bench import artefact
from bench.padded_ep import PaddedExperts, capacity, paper_factor
from bench.sharded_paper import SKEWED_SHARE, router_E, simulate, table
from hostcompute import Activation, ActivationKind, DType, ExpertBank, ExpertSpec, make_pool
from monde.config import MondeConfig
from monde.core import RoutedBatch
from monde.executors.host import HostExecutor
from monde.executors.ranked_batch import RankedBatch, exchange_batch
from monde.executors.ranked_model import RankedModel
from monde.executors.ranks import RankGroup, ranks_of_mesh
from monde.weights.staging import Staging

D, F = 768, 3072
MAX_PADDED_ROWS = 6000  # of a rank: more would take minutes on a core
Step = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    simulated = commands.add_parser("simulate")
    measured = commands.add_parser("measure")
    measured.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    measured.add_argument("--tokens", type=int, nargs="+", default=[1, 120, 480], help="of every rank")
    measured.add_argument("--rounds", type=int, default=5)
    for command in (simulated, measured):
        command.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "simulate":
        found = simulate()
        print(table(found["rows"], batch=250))
        artefact.write("sharded_simulated", {}, found, arguments.out)
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = [row for num_experts in arguments.experts for row in measure(num_experts, arguments)]
    if dist.get_rank() == 0:
        configuration = {"num_ranks": dist.get_world_size(), "d_model": D, "d_ffn": F} | vars(arguments)
        configuration["out"] = None
        artefact.write(f"sharded_gloo_{dist.get_world_size()}", configuration, results, arguments.out)
    dist.destroy_process_group()


def measure(num_experts: int, arguments: Any) -> list[dict[str, Any]]:
    """All batches and routers with one number of experts."""
    layer = Layer(num_experts)
    rows = []
    for num_tokens in arguments.tokens:
        for share in (0.0, SKEWED_SHARE):
            contenders = layer.contenders(routed(num_tokens, num_experts, share, layer.ranks.rank))
            row = row_of(contenders, layer.ranks, arguments.rounds)
            rows.append({"num_experts": num_experts, "num_tokens": num_tokens, "skew": share} | row)
            rows[-1] |= layer.facts("padded" in contenders)
            if layer.ranks.rank == 0:
                print(line(rows[-1]), flush=True)
    rows[0]["cost"] = asdict(layer.model.costs[0])
    layer.close()
    return rows


class Layer:
    """One layer's experts, held by this rank in every form."""

    def __init__(self, num_experts: int) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        relu = Activation(ActivationKind.RELU)
        spec = ExpertSpec(num_experts, D, F, DType.F32, gated=False, activation=relu)
        self.ranks = ranks_of_mesh(mesh, timeout_s=120)
        config = MondeConfig(device="cpu", mesh=mesh, parallel="auto", mesh_timeout_s=120)
        self.model = RankedModel(self.ranks, config, [spec])
        pool = make_pool(None, self.ranks.cores)
        self.banks = [ExpertBank(part, "native", pool) for part in self.model.specs]
        mine = self.load(num_experts)
        hosts = [HostExecutor(bank, Staging(pinned=False)) for bank in self.banks]
        compute_P = [partial(computed, host) for host in hosts]
        self.model.measure(0, compute_P[0], torch.device("cpu"))
        self.executor = self.model.executor(0, compute_P)
        self.num_experts, self.padded = num_experts, None
        if num_experts % self.ranks.size == 0:
            self.padded = PaddedExperts(mine, num_experts, paper_factor(num_experts))

    def load(self, num_experts: int) -> list[dict[str, Tensor]]:
        """Random weights into the banks; the arrays of this rank's whole experts."""
        first, end = self.model.first_expert_LW1[0][self.ranks.rank : self.ranks.rank + 2]
        mine = []
        for expert_id in range(num_experts):
            generator = torch.Generator().manual_seed(expert_id)
            arrays = {
                "up": torch.randn((F, D), generator=generator) / D**0.5,
                "down": torch.randn((D, F), generator=generator) / F**0.5,
            }
            for part_idx, local_id, part in self.model.parts_of(0, expert_id, arrays):
                self.banks[part_idx].load(local_id, **part)
            mine += [arrays] if first <= expert_id < end else []
        return mine

    def contenders(self, batch: RoutedBatch) -> dict[str, Step]:
        sharded, peers, padded = self.executor.sharded, self.executor.peers, self.padded
        assert sharded is not None
        assert peers is not None

        def ranked() -> RankedBatch:
            return exchange_batch(self.ranks, 0, batch, self.executor.home_E1, self.num_experts)

        self.counts = ranked().counts
        steps: dict[str, Step] = {
            "ours": lambda: self.executor.forward(batch),
            "sharded, 1 chunk": lambda: sharded.forward(ranked(), 1),
            "dropless peers": lambda: peers.forward(ranked()),
        }
        num_rows = self.num_experts * capacity(
            len(batch.x_TD), self.num_experts, paper_factor(self.num_experts)
        )
        if padded is not None and num_rows <= MAX_PADDED_ROWS:
            steps["padded"] = lambda: padded.forward(batch.x_TD, batch.topk_ids_TK, batch.topk_weights_TK)
        return steps

    def facts(self, with_padded: bool) -> dict[str, Any]:
        """Of the latest batch: what was planned, pairs by rank, tokens that padding dropped."""
        assert self.executor.last_plan is not None
        first_W1, pairs_E = self.model.first_expert_LW1[0], self.counts.pairs_E
        dropped = self.ranks.agree(self.padded.num_dropped if with_padded and self.padded else 0)
        return {
            "plan": asdict(self.executor.last_plan),
            "pairs_by_rank": {
                "sharded": [sum(pairs_E) * share for share in self.model.share_W],
                "peers": [sum(pairs_E[first:end]) for first, end in pairwise(first_W1)],
            },
            "dropped": sum(dropped) if with_padded else None,
        }

    def close(self) -> None:
        for bank in self.banks:
            bank.close()


def computed(host: HostExecutor, batch: RoutedBatch, out_dtype: torch.dtype) -> Tensor:
    return host.submit(batch, out_dtype).wait()


def routed(num_tokens: int, num_experts: int, share: float, rank: int) -> RoutedBatch:
    rng = np.random.default_rng(rank)
    ids_T1 = rng.choice(num_experts, (num_tokens, 1), p=router_E(num_experts, share))
    x_TD = torch.from_numpy(rng.standard_normal((num_tokens, D), np.float32))
    return RoutedBatch(
        x_TD, torch.from_numpy(ids_T1), torch.from_numpy(rng.random((num_tokens, 1), np.float32))
    )


def row_of(contenders: dict[str, Step], ranks: RankGroup, num_rounds: int) -> dict[str, Any]:
    """Errors: AssertionError where contenders differ by more than the order of fp32 sums of D + F terms explains."""
    answers = {name: step() for name, step in contenders.items()}
    want = answers["dropless peers"]
    bound = (
        2 * torch.finfo(torch.float32).eps * (D + F) * max(1.0, float(want.abs().max()) if len(want) else 1.0)
    )
    for name, y_TD in answers.items():
        worst = float((y_TD - want).abs().max())
        assert worst <= bound, f"{name} is off by {worst}, bound {bound}"
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(num_rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            ranks.agree()
            start_s = time.perf_counter()
            contenders[name]()
            samples[name].append(max(ranks.agree(time.perf_counter() - start_s)))
    return {
        "median_s": {name: statistics.median(one) for name, one in samples.items()},
        "samples_s": {name: [float(f"{s:.4g}") for s in one] for name, one in samples.items()},
    }


def line(row: dict[str, Any]) -> str:
    times = "  ".join(f"{name} {seconds_s * 1e3:.2f} ms" for name, seconds_s in row["median_s"].items())
    plan = row["plan"]
    return (
        f"E={row['num_experts']} T={row['num_tokens']} skew={row['skew']} rho={plan['rho']:.2f}: {times}  "
        f"(chose {plan['way']}, {plan['num_chunks']} chunks; predicted {plan['sharded_s'] * 1e3:.2f} / "
        f"{plan['peers_s'] * 1e3:.2f} ms)"
    )


if __name__ == "__main__":
    main()
