"""A long prompt's expert layers on GPU, bus and host at once, next to pure fetching, pure host compute and the bound.

True dimensions (Qwen3-30B-A3B: D=2048, F=768, 128 experts, top-8; Mixtral-8x7B: D=4096, F=14336, 8 experts, top-2;
bf16), as many layers as the machine has time for. Milliseconds a layer of
    monde    counts read back, the exact split: resident, fetched, host, one expert cut along F
    fetch    every cold expert over the bus, through the same staging
    host     every cold expert on the host, with the same kernels
    monde-rule, fiddler, two-ended    the rules of MoNDE, Fiddler and HybriMoE, by --contenders
    bound    max(1 / (1 / h + 1 / c), the GPU's part): h and c are the cold experts' seconds on the host and over the
             bus, each measured while the other runs; the GPU's part is its operations at the rate of a large product
Below each, what Python did a layer: count, wait for the counts, plan, launch, wait for the host, combine; and the
device's time from a layer's first kernel to its last.
All contenders see the same weights and fresh routings; they take turns. Letters as in monde.core.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hostcompute
from bench import artefact, host_layers
from bench.prefill_ceilings import Bus, Ceilings, HostAlone, measure, profile_of
from hostcompute import ExpertBank, ExpertSpec
from monde.core import Placement, RoutedBatch
from monde.device.pinned import PinnedRange
from monde.executors.host import host_threads
from monde.executors.prefill import PrefillExecutor
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import PrefillSize
from monde.executors.waves import PHASES
from monde.planning.feedback import Feedback
from monde.planning.profile import HardwareProfile
from monde.planning.split import Where
from monde.planning.split_policies import SPLIT_POLICIES, SplitPolicy
from monde.weights.host import HostBlobs
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable

GPU = torch.device("cuda", 0)
MODELS = {"qwen3": (ExpertSpec(128, 2048, 768), 8, 6), "mixtral": (ExpertSpec(8, 4096, 14336), 2, 3)}
SHARES = {"none": 0.0, "quarter": 0.25, "half": 0.5, "all": 1.0}
CONTENDERS: dict[str, tuple[SplitPolicy, bool]] = {
    "monde": (SPLIT_POLICIES["best"], True),
    "fetch": (SPLIT_POLICIES["all-fetch"], True),
    "host": (SPLIT_POLICIES["all-host"], False),
    **{name: (SPLIT_POLICIES[name], False) for name in ("monde-rule", "fiddler", "two-ended")},
}
NUM_WARM_UPS, NUM_STEPS = 3, 7
# Two results in bf16 whose products are rounded at different places; beyond it something is wrong.
AGREEMENT = 2.0**-6


@dataclass(frozen=True)
class Row:
    """One contender in one case; seconds a layer. fetched, on_host, cut_rows: of the last layer's last plan."""

    contender: str
    tokens: int
    residents: str
    median_s: float
    bound_s: float
    samples_s: list[float]
    host_alone_s: float
    host_beside_s: float
    bus_alone_s: float
    bus_beside_s: float
    gpu_part_s: float
    fetched: int
    on_host: int
    cut_rows: int
    planned_s: dict[str, float]
    host_busy_s: float
    h2d_bytes: float
    feedback: dict[str, float]
    phases_s: dict[str, float]
    device_s: float


class Model:
    """Layers with their first experts in slots, and all of them pinned on the host."""

    def __init__(
        self, banks: Sequence[ExpertBank], num_resident: int, profile: HardwareProfile, num_topk: int
    ) -> None:
        spec = banks[0].spec
        size = PrefillSize.of([spec], 2, 4096, num_topk)
        self.hub = PrefillHub(GPU, size, profile)
        entries = tuple(e if e < num_resident else -1 for e in range(spec.num_experts))
        self.layers: list[PrefillExecutor] = []
        self.around: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # each layer of the steps so far
        for layer_idx, bank in enumerate(banks):
            blobs = HostBlobs(bank)
            slots = ExpertSlots(spec, num_resident, GPU) if num_resident else None
            for e in range(num_resident):
                assert slots is not None
                slots.blobs_SB[e].copy_(blobs.blob_B(e), non_blocking=True)
            table = SlotTable(Placement(entries), GPU)
            self.layers.append(PrefillExecutor(layer_idx, bank, slots, table, self.hub, lambda b=blobs: b))
        torch.cuda.synchronize()

    def become(self, contender: str) -> None:
        self.hub.forget()
        self.hub.policy, self.hub.fetches_ahead = CONTENDERS[contender]
        self.hub.feedback = Feedback()
        for layer in self.layers:
            layer.share_E = None

    def step(
        self, x_TD: torch.Tensor, weights_TK: torch.Tensor, routings: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        y_TD = x_TD
        for layer, ids_TK in zip(self.layers, routings, strict=True):
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
            y_TD = layer.forward(RoutedBatch(x_TD, ids_TK, weights_TK))
            events[1].record()
            self.around.append(events)
        return y_TD

    def reset(self) -> None:
        """Forget what was measured."""
        self.around.clear()
        for layer in self.layers:
            layer.reset_totals()

    def phases_s(self) -> dict[str, float]:
        """Means over the layers since `reset`."""
        num_layers = sum(layer.phases.num_layers for layer in self.layers)
        return {
            name: sum(getattr(layer.phases, name) for layer in self.layers) / num_layers for name in PHASES
        }

    def device_s(self) -> float:
        return statistics.median(start.elapsed_time(end) for start, end in self.around) * 1e-3

    def close(self) -> None:
        self.hub.close()


def random_routings(
    spec: ExpertSpec, num_topk: int, num_tokens: int, count: int, skew: float
) -> list[np.ndarray]:
    """Top-k of random scores, expert e drawn in proportion to (e + 1) ** -skew: residents are the hottest."""
    rng = np.random.default_rng(0)
    popularity_E = -skew * np.log1p(np.arange(spec.num_experts))
    scores = (rng.gumbel(size=(num_tokens, spec.num_experts)) + popularity_E for _ in range(count))
    return [np.argpartition(-score, num_topk - 1, axis=1)[:, :num_topk].astype(np.int64) for score in scores]


def check(
    model: Model, x_TD: torch.Tensor, weights_TK: torch.Tensor, routings: Sequence[torch.Tensor]
) -> float:
    """Contenders' answers for one step against pure fetching's. Errors: RuntimeError where they differ."""
    answers = {}
    for name in CONTENDERS:
        model.become(name)
        answers[name] = model.step(x_TD, weights_TK, routings).float()
    worst = 0.0
    for name, y_TD in answers.items():
        error = float((y_TD - answers["fetch"]).norm() / answers["fetch"].norm())
        if not error <= AGREEMENT:
            raise RuntimeError(
                f"{name} differs from fetch by {error:.3g} of the result, allowed {AGREEMENT:.3g}"
            )
        worst = max(worst, error)
    return worst


def time_contender(
    model: Model, name: str, x_TD: torch.Tensor, weights_TK: torch.Tensor, routings: Sequence[torch.Tensor]
) -> list[float]:
    """Seconds a layer of NUM_STEPS steps, each layer with another routing in every step."""
    model.become(name)
    num_layers, samples = len(model.layers), []
    for step in range(NUM_WARM_UPS + NUM_STEPS):
        chosen = [routings[(step * num_layers + l) % len(routings)] for l in range(num_layers)]
        torch.cuda.synchronize()
        if step == NUM_WARM_UPS:
            model.reset()
        start_s = time.perf_counter()
        model.step(x_TD, weights_TK, chosen)
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start_s) / num_layers)
    return samples[NUM_WARM_UPS:]


def run_case(
    model: Model,
    banks: Sequence[ExpertBank],
    bus: Bus,
    top: Ceilings,
    options: argparse.Namespace,
    tokens: int,
    where: str,
) -> list[Row]:
    spec, num_topk, _ = MODELS[options.model]
    first_cold = round(SHARES[where] * spec.num_experts)
    drawn = random_routings(spec, num_topk, tokens, 2 * len(banks), options.skew)
    routings = [torch.from_numpy(ids).cuda() for ids in drawn]
    x_TD = torch.randn(tokens, spec.d_model, device="cuda").bfloat16()
    weights_TK = torch.full((tokens, num_topk), 1 / num_topk, device="cuda")
    difference = check(model, x_TD, weights_TK, routings[: len(banks)])
    cold_bytes = statistics.mean(len(np.unique(ids[ids >= first_cold])) for ids in drawn) * spec.expert_bytes
    flops = 6 * spec.d_model * spec.d_ffn
    resident_pairs = statistics.mean(int((ids < first_cold).sum()) for ids in drawn)
    num_resident = statistics.mean(len(np.unique(ids[ids < first_cold])) for ids in drawn)
    gpu_part_s = max(
        resident_pairs * flops / top.gpu_flops_per_s, num_resident * spec.expert_bytes / top.hbm_bytes_per_s
    )
    host_s = host_beside_s = bus_s = bus_beside_s = bound_s = 0.0
    if first_cold < spec.num_experts:
        host = HostAlone(banks, tokens, drawn, first_cold)
        host_s = host.alone_s(4)
        host_beside_s, beside_bytes_per_s = host.beside(bus, 4, host_s, top.h2d_bytes_per_s)
        bus_s, bus_beside_s = cold_bytes / top.h2d_bytes_per_s, cold_bytes / beside_bytes_per_s
        bound_s = 1 / (1 / host_beside_s + 1 / bus_beside_s)
    bound_s = max(bound_s, gpu_part_s)
    rows = []
    for name in options.contenders if first_cold < spec.num_experts else ("monde",):
        samples = time_contender(model, name, x_TD, weights_TK, routings)
        layer = model.layers[-1]
        plan = layer.latest  # none where all experts are resident
        num_fetched = num_on_host = cut_rows = 0
        planned_s = dict.fromkeys(("copy", "gemm", "host", "makespan"), 0.0)
        if plan is not None:
            split = plan.split
            num_fetched, cut_rows = split.num_fetched, split.cut_rows
            num_on_host = int((split.where_E == Where.HOST).sum())
            planned_s = {name: getattr(split, f"{name}_s") for name in planned_s}
        busy_s = sum(one.totals.busy_s for one in model.layers) / (NUM_STEPS * len(model.layers))
        h2d = sum(one.totals.h2d_bytes for one in model.layers) / (NUM_STEPS * len(model.layers))
        row = Row(
            name,
            tokens,
            where,
            statistics.median(samples),
            bound_s,
            samples,
            host_s,
            host_beside_s,
            bus_s,
            bus_beside_s,
            gpu_part_s,
            num_fetched,
            num_on_host,
            cut_rows,
            planned_s,
            busy_s,
            h2d,
            dataclasses.asdict(model.hub.feedback),
            model.phases_s(),
            model.device_s(),
        )
        rows.append(row)
        print(
            f"{tokens:5} tokens, {where:7} resident  {name:6}{row.median_s * 1e3:8.2f} ms a layer, bound "
            f"{bound_s * 1e3:7.2f} ms, {bound_s / row.median_s:4.0%} of it | {row.fetched:3} fetched, {row.on_host:3} on "
            f"host, cut {row.cut_rows:5} | planned copy {planned_s['copy'] * 1e3:6.2f} host {planned_s['host'] * 1e3:6.2f} "
            f"gemm {planned_s['gemm'] * 1e3:5.2f} ms, host busy {busy_s * 1e3:6.2f} ms, h2d {h2d / 1e6:6.0f} MB, feedback host "
            f"{model.hub.feedback.host:.2f} copy {model.hub.feedback.copy:.2f}, differs {difference:.1e}",
            flush=True,
        )
        parts = ", ".join(f"{part.removesuffix('_s')} {s * 1e3:.2f}" for part, s in row.phases_s.items())
        print(f"{'':15} ms a layer: {parts}; device {row.device_s * 1e3:.2f}", flush=True)
    return rows


def main() -> None:
    started_s = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m bench.prefill", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3")
    parser.add_argument("--layers", type=int, help="MoE layers (default 6 of 1.2 GB, or 3 of 2.8 GB)")
    numbers: dict[str, Any] = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument(
        "--tokens", **numbers, default=[128, 512, 2048], help="of a prompt (default 128,512,2048)"
    )
    parser.add_argument(
        "--residents", type=lambda text: text.split(","), default=list(SHARES), help=",".join(SHARES)
    )
    parser.add_argument(
        "--contenders",
        type=lambda text: text.split(","),
        default=["monde", "fetch", "host"],
        help=f"of {','.join(CONTENDERS)} (default monde,fetch,host)",
    )
    parser.add_argument(
        "--skew", type=float, default=0.0, help="Zipf exponent of the routing (default 0, uniform)"
    )
    parser.add_argument("--seconds", type=float, default=75.0, help="no case starts later (default 75)")
    parser.add_argument("--out", type=Path, help="where the artefact goes (default: bench/results/)")
    options = parser.parse_args()
    if unknown := set(options.contenders) - set(CONTENDERS):
        parser.error(f"--contenders: {', '.join(sorted(unknown))}; expected some of {', '.join(CONTENDERS)}")
    spec, num_topk, num_layers = MODELS[options.model]
    num_layers = options.layers or num_layers
    pool = hostcompute.make_pool(host_threads())
    layer = host_layers.make_layer(spec, 0)
    banks = [host_layers.fill_bank(layer, ExpertBank(spec, "native", pool)) for _ in range(num_layers)]
    blobs = [HostBlobs(bank) for bank in banks]
    print(f"{num_layers} layers packed after {time.perf_counter() - started_s:.1f} s", flush=True)
    pinned = [PinnedRange(b.address, b.num_bytes, b, GPU) for b in blobs]
    print(f"pinned after {time.perf_counter() - started_s:.1f} s", flush=True)
    bus = Bus(blobs)
    top = measure(bus, pool, banks[0].choice.isa)
    host_slow = top.host_read_bytes_per_s / top.host_read_beside_h2d_bytes_per_s
    copy_slow = top.h2d_bytes_per_s / top.h2d_beside_read_bytes_per_s
    profile = profile_of(banks, top, host_slow, copy_slow)
    print(
        f"{torch.cuda.get_device_name()}; {pool.num_threads} host threads, {banks[0].choice.isa}; bus "
        f"{top.h2d_bytes_per_s / 1e9:.1f} GB/s ({top.h2d_beside_read_bytes_per_s / 1e9:.1f} beside the host), host read "
        f"{top.host_read_bytes_per_s / 1e9:.0f} GB/s ({top.host_read_beside_h2d_bytes_per_s / 1e9:.0f} beside the bus), GPU "
        f"{top.gpu_flops_per_s / 1e12:.0f} TFLOP/s, {top.hbm_bytes_per_s / 1e12:.2f} TB/s; after "
        f"{time.perf_counter() - started_s:.1f} s",
        flush=True,
    )
    rows: list[Row] = []
    skipped: list[str] = []
    for where in options.residents:
        model = None
        for tokens in sorted(options.tokens, reverse=True):
            if time.perf_counter() - started_s > options.seconds:
                skipped.append(f"{tokens} tokens, {where}")
                continue
            if model is None:
                model = Model(banks, round(SHARES[where] * spec.num_experts), profile, num_topk)
            rows += run_case(model, banks, bus, top, options, tokens, where)
        if model is not None:
            model.close()
            del model
            torch.cuda.empty_cache()
    if skipped:
        print(f"skipped after {options.seconds:g} s: {'; '.join(skipped)}; raise --seconds")
    configuration = {k: v for k, v in vars(options).items() if k != "out"} | {
        "spec": dataclasses.asdict(spec),
        "topk": num_topk,
        "num_layers": num_layers,
        "host_threads": pool.num_threads,
        "isa": banks[0].choice.isa,
        "gpu": torch.cuda.get_device_name(),
        "warm_ups": NUM_WARM_UPS,
        "steps": NUM_STEPS,
    }
    results = {
        "ceilings": dataclasses.asdict(top),
        "profile": dataclasses.asdict(profile),
        "rows": [dataclasses.asdict(row) for row in rows],
        "skipped": skipped,
    }
    print(f"artefact: {artefact.write('prefill_layers', configuration, results, options.out)}")
    for one in pinned:
        one.close()
    print(f"done after {time.perf_counter() - started_s:.1f} s")


if __name__ == "__main__":
    main()
