"""MoNDE's evaluation in the simulator: its models on its device, its schemes, others' and ours, encoder and decoder.

Prints the tables of docs/monde-evaluation.md as they stand there.

    python bench/monde_paper.py [--out results.json]

Everything assumed is in `Workload`, `monde-device` of monde/planning/machines.py and docs/monde-evaluation.md.
T tokens of a pass, E experts, D model dim, F expert hidden dim.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import artefact
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.machines import DESCRIBED
from monde.planning.profile import HardwareProfile, PromptLaunches
from monde.planning.share import best_share
from monde.planning.simulate import contention_of, simulate
from monde.planning.split import ExpertSplit, Load, best_split
from monde.planning.split_policies import SplitPolicy, all_fetch, all_host, fiddler, monde_rule, two_ended
from monde.planning.step import LayerStep, step_schedule

MACHINES = ["monde-device", "laptop-4060", "epyc-4090", "desktop-5090", "xeon-2s-a100", "h200"]
BATCHES = (1, 4, 16)
DENSE_BLOCK_S = {"eager": 1.0e-3, "graph": 0.0}  # launch cost of a block's dense part beside its arithmetic


@dataclass(frozen=True)
class Model:
    """An encoder and a decoder of num_blocks each, every moe_every-th with experts."""

    name: str
    d_model: int
    d_ffn: int
    num_experts: int
    num_topk: int
    num_blocks: int
    moe_every: int

    @property
    def shape(self) -> ExpertShape:
        return ExpertShape(self.d_model, self.d_ffn, gated=False)


MODELS = [
    Model("Switch-Large-128", 1024, 4096, 128, 1, 24, 2),
    Model("NLLB-MoE-54B", 2048, 8192, 128, 2, 24, 4),
]


@dataclass(frozen=True)
class Traffic:
    """Tokens of every expert in one pass, and how popular it is in the long run, as a heat record would show."""

    tokens_LE: NDArray[np.int64]
    popularity_LE: NDArray[np.float64]


@dataclass(frozen=True)
class Workload:
    """One pass: the encoder over batch x 512 tokens, or one step of the decoder over batch tokens.

    Expert e gets tokens with a probability in proportion to 1 / rank ** skew; ranks differ from layer to layer.
    """

    part: str
    batch: int
    skew: float = 1.0
    sequence: int = 512

    @property
    def num_tokens(self) -> int:
        return self.batch * (self.sequence if self.part == "encoder" else 1)

    @cache  # noqa: B019 - workloads are few and live as long as the process
    def traffic(self, model: Model) -> Traffic:
        rng = np.random.default_rng(0)
        weight_E = 1 / np.arange(1, model.num_experts + 1) ** self.skew
        tokens, popularity = [], []
        for _ in range(model.num_blocks // model.moe_every):
            popularity.append(rng.permutation(weight_E))
            # The K largest of log p + Gumbel noise are K distinct experts drawn by p.
            score_TE = np.log(popularity[-1]) + rng.gumbel(size=(self.num_tokens, model.num_experts))
            chosen_TK = np.argpartition(-score_TE, model.num_topk - 1, axis=1)[:, : model.num_topk]
            tokens.append(np.bincount(chosen_TK.ravel(), minlength=model.num_experts))
        return Traffic(np.stack(tokens), np.stack(popularity))


def tuned_rule(load: Load, cost: CostModel) -> ExpertSplit:
    """MoNDE's rule with the alpha, of a sixteenth to four, that suits the layer best."""
    return min((monde_rule(load, cost, 2.0**k) for k in range(-4, 3)), key=lambda split: split.makespan_s)


def dense_s(model: Model, workload: Workload, cost: CostModel, block: int, launch_s: float) -> float:
    """Attention (twice in a decoder) and, in blocks without experts, the dense FFN."""
    D, F = model.d_model, model.d_ffn
    num_weights = 4 * D * D * (1 if workload.part == "encoder" else 2)
    num_weights += 0 if is_moe(model, block) else 2 * D * F
    rate, t = cost.gpu.expert, workload.num_tokens
    flops_per_s = float(rate.flops_per_s.at(t))
    return launch_s + max(2 * num_weights / rate.bytes_per_s, 2 * num_weights * t / flops_per_s)


def is_moe(model: Model, block: int) -> bool:
    return block % model.moe_every == model.moe_every - 1


def blocks_of(
    model: Model,
    workload: Workload,
    cost: CostModel,
    launch_s: float,
    resident_share: float,
    cut_granule: int | None,
) -> Iterator[tuple[float, Load | None]]:
    """Dense seconds and load of every block; the most popular experts of each layer, in the long run, are resident."""
    traffic = workload.traffic(model)
    num_resident = round(resident_share * model.num_experts)
    l = 0
    for block in range(model.num_blocks):
        block_s = dense_s(model, workload, cost, block, launch_s)
        if not is_moe(model, block):
            yield block_s, None
            continue
        resident_E = np.zeros(model.num_experts, bool)
        resident_E[np.argsort(-traffic.popularity_LE[l], kind="stable")[:num_resident]] = True
        yield block_s, Load(traffic.tokens_LE[l], resident_E, workload.num_tokens, cut_granule)
        l += 1


def simulated_s(blocks: Iterable[tuple[float, Load | None]], cost: CostModel, policy: SplitPolicy) -> float:
    """Seconds of one pass under a split policy."""
    layers = [LayerStep(dense, load, None if load is None else policy(load, cost)) for dense, load in blocks]
    return simulate(step_schedule(layers, cost), contention_of(cost.profile)).makespan_s


def zero_copy_s(blocks: Iterable[tuple[float, Load | None]], cost: CostModel) -> float:
    """Seconds of one decode step in which the GPU reads a share of every cold expert's F over the bus."""
    total_s = 0.0
    for dense, load in blocks:
        total_s += dense
        if load is not None:
            cold_E = np.where(load.resident_E, 0, load.tokens_E)
            share = best_share(
                gpu_s=float(cost.zero_copy_s(cold_E).sum()),
                host_s=float(cost.host_s(cold_E).sum()),
                overlap=cost.gpu.host_while_copying,
                gpu_lead_s=float(cost.resident_s(load.tokens_E - cold_E).sum()),
                host_lead_s=cost.round_trip_s(load.num_tokens) if cold_E.any() else 0.0,
            )
            total_s += share.step_s
    return total_s


def launched(profile: HardwareProfile) -> HardwareProfile:
    """Without what Python takes in a prompt's layer: the dense blocks say who launches, and how long that takes."""
    assert profile.gpu is not None
    return replace(profile, gpu=replace(profile.gpu, prompt=PromptLaunches.none()))


def schemes_s(model: Model, workload: Workload, cost: CostModel, launch_s: float) -> dict[str, float]:
    """Seconds of every scheme; resident shares are of all experts. Zero-copy is for decoders only."""

    def blocks(resident_share: float, granule: int | None = None) -> Iterator[tuple[float, Load | None]]:
        return blocks_of(model, workload, cost, launch_s, resident_share, granule)

    seconds = {
        "GPU+PM": simulated_s(blocks(0.0), cost, all_fetch),
        "ideal": simulated_s(blocks(1.0), cost, all_host),
        "MD+AM": simulated_s(blocks(0.0), cost, all_host),
        "MD+LB": simulated_s(blocks(0.0), cost, tuned_rule),
        "Fiddler": simulated_s(blocks(0.0), cost, fiddler),
        "HybriMoE": simulated_s(blocks(0.0), cost, two_ended),
        "monde, no slots": simulated_s(blocks(0.0, 64), cost, best_split),
        "1/8 resident": simulated_s(blocks(1 / 8, 64), cost, best_split),
        "1/4 resident": simulated_s(blocks(1 / 4, 64), cost, best_split),
    }
    if workload.part == "decoder":
        seconds["no slots, zero-copy"] = zero_copy_s(blocks(0.0), cost)
        seconds["1/4 resident, zero-copy"] = zero_copy_s(blocks(1 / 4), cost)
    return seconds


def all_rows() -> list[dict[str, Any]]:
    """Every machine, model, part, batch and kind of dense part."""
    rows = []
    for machine in MACHINES:
        for model in MODELS:
            cost = CostModel(launched(DESCRIBED[machine]), model.shape)
            for part in ("encoder", "decoder"):
                for batch in BATCHES:
                    for dense, launch_s in DENSE_BLOCK_S.items():
                        workload = Workload(part, batch)
                        seconds = schemes_s(model, workload, cost, launch_s)
                        row = {"machine": machine, "model": model.name, **asdict(workload), "dense": dense}
                        rows.append(row | {"seconds": seconds})
    return rows


def tables(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Times as fast as GPU+PM: on the paper's device, and on machines one can buy at batch 4 in graph mode."""
    paper = [row for row in rows if row["machine"] == MACHINES[0]]
    bought = [row for row in rows if row["machine"] != MACHINES[0]]
    bought = [row for row in bought if row["batch"] == 4 and row["dense"] == "graph"]
    return (
        _table(paper, ("model", "part", "batch", "dense")),
        _table(bought, ("machine", "model", "part")),
    )


def _table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"] if name != "GPU+PM"))
    lines = [f"| {' | '.join((*keys, 'GPU+PM', *names))} |", "|---" * (len(keys) + 1 + len(names)) + "|"]
    for row in rows:
        s = row["seconds"]
        speeds = (f"{s['GPU+PM'] / s[n]:.1f}" if n in s else "" for n in names)
        cells = (*(str(row[key]) for key in keys), f"{s['GPU+PM']:.3f} s", *speeds)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    rows = all_rows()
    print("\n\n".join(tables(rows)))
    if args.out:
        configuration = {"machines": [asdict(DESCRIBED[m]) for m in MACHINES], "dense_block_s": DENSE_BLOCK_S}
        artefact.write("monde_paper", configuration, rows, args.out)


if __name__ == "__main__":
    main()
