"""A decode step's expert layers on GPU and host at once, as one CUDA graph, next to the bound and to torch.

Real dimensions (Qwen3-30B-A3B: D=2048, F=768, 128 experts, top-8, bf16), as many layers as the machine has time for.
Every row: batch, share of resident experts, microseconds a layer, and
    bound = max(cold bytes / host read bandwidth, resident bytes / HBM bandwidth) + a hand-over to the host
where the host's memory is read by processor and bus at once, and all ceilings are measured in the same run.
Contenders: all cold experts on the host, bounded by what the processor reads alone; and for everything resident
gathered weights and bmm, which is transformers' batched_mm, captured in a graph as well. Letters as in monde.core.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import hostcompute
from bench import artefact, host_layers, prefill_ceilings
from hostcompute import ExpertBank, ExpertSpec
from hostcompute.backends.select import choose
from monde.core import Placement, RoutedBatch
from monde.device.pinned import PinnedRange
from monde.executors.decode import DecodeExecutor, DecodeHub
from monde.executors.host import host_threads
from monde.executors.zero_copy import first_share
from monde.profile_store import profile_of, this_machine
from monde.weights.host import HostBlobs
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable

SPEC, TOPK = ExpertSpec(128, 2048, 768), 8
NUM_ROUTINGS = 32
NUM_WARM_UPS, NUM_STEPS = 60, 60  # the share needs some steps to find its place


@dataclass(frozen=True)
class Ceilings:
    """Measured before the rows; seconds of a layer whose experts are next to nothing."""

    host_read_bytes_per_s: float
    host_and_bus_read_bytes_per_s: float  # at the same time
    hbm_read_bytes_per_s: float
    round_trip_s: float


@dataclass(frozen=True)
class Row:
    """One contender in one case; times are per layer."""

    contender: str
    batch: int
    num_resident: int
    cold_bytes: float
    resident_bytes: float
    bound_s: float
    median_s: float
    samples_s: list[float]
    share: float  # of cold experts' F that the GPU read from host memory at the end


class Hybrid:
    """Layers with the first `num_resident` experts in slots and all of them in host memory.

    pinned: a view of each bank's memory that the GPU may read; None: it may not.
    """

    def __init__(
        self,
        banks: list[ExpertBank],
        spec: ExpertSpec,
        num_resident: int,
        pool: object,
        pinned: list[HostBlobs] | None = None,
    ) -> None:
        device = torch.device("cuda:0")
        specs = [spec] * len(banks)
        share = first_share(profile_of(this_machine()))
        self.hub = DecodeHub(specs, banks, torch.bfloat16, device, pool, share=share)
        entries = tuple(e if e < num_resident else -1 for e in range(spec.num_experts))
        self.executors = []
        for layer_idx in range(len(banks)):
            slots = ExpertSlots(spec, num_resident, device) if num_resident else None
            if slots is not None:  # any bytes do for timing, but zeros would not
                slots.blobs_SB.view(torch.bfloat16).normal_(std=0.02)
            heat_E = torch.zeros(spec.num_experts, device=device)
            table = SlotTable(Placement(entries), device)
            host = None if pinned is None else pinned[layer_idx]
            self.executors.append(DecodeExecutor(layer_idx, spec, slots, table, heat_E, self.hub, host))

    def step(self, batch: RoutedBatch) -> None:
        for executor in self.executors:
            executor.forward(batch)

    def before_replay(self) -> None:
        self.hub.begin_step()
        self.hub.before_replay()

    @property
    def share(self) -> float:
        return 0.0 if self.hub.balance is None else self.hub.balance.share

    def close(self) -> None:
        self.hub.check()
        self.hub.close()


class Gathered:
    """transformers' batched_mm: the weights of every routed pair are gathered, then multiplied."""

    def __init__(self, num_layers: int, spec: ExpertSpec) -> None:
        E, D, F = spec.num_experts, spec.d_model, spec.d_ffn
        shape = {"device": "cuda", "dtype": torch.bfloat16}
        self.gate_up_ENK = [torch.empty(E, 2 * F, D, **shape).normal_(std=0.02) for _ in range(num_layers)]
        self.down_EDF = [torch.empty(E, D, F, **shape).normal_(std=0.02) for _ in range(num_layers)]

    def step(self, batch: RoutedBatch) -> None:
        ids_R, K = batch.topk_ids_TK.flatten(), batch.topk_ids_TK.shape[1]
        x_RD1 = batch.x_TD.repeat_interleave(K, 0).unsqueeze(-1)
        for gate_up_ENK, down_EDF in zip(self.gate_up_ENK, self.down_EDF, strict=True):
            gate, up = torch.bmm(gate_up_ENK[ids_R], x_RD1).chunk(2, dim=1)
            v_RD = torch.bmm(down_EDF[ids_R], torch.nn.functional.silu(gate) * up).squeeze(-1)
            weighted = v_RD * batch.topk_weights_TK.flatten()[:, None]
            weighted.view(*batch.topk_ids_TK.shape, -1).sum(1)

    share = 0.0

    def before_replay(self) -> None: ...

    def close(self) -> None: ...


def time_graph(
    contender: Hybrid | Gathered,
    batch: RoutedBatch,
    routings: list[torch.Tensor],
    num_layers: int,
    without: Callable[[], float] = lambda: 0.0,
) -> list[float]:
    """Seconds a layer of NUM_STEPS replays, with a fresh routing in each. without: seconds so far that do not count."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            contender.step(batch)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        contender.step(batch)
    samples = []
    for i in range(NUM_WARM_UPS + NUM_STEPS):
        batch.topk_ids_TK.copy_(routings[i % len(routings)])
        torch.cuda.synchronize()
        start_s, without_s = time.perf_counter(), without()
        contender.before_replay()
        graph.replay()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start_s - (without() - without_s)) / num_layers)
    return samples[NUM_WARM_UPS:]


def make_batch(num_tokens: int, spec: ExpertSpec, num_topk: int) -> tuple[RoutedBatch, list[torch.Tensor]]:
    routings = [
        torch.from_numpy(ids).cuda()
        for ids in host_layers.random_routings(spec, num_topk, num_tokens, NUM_ROUTINGS)
    ]
    x_TD = torch.randn(num_tokens, spec.d_model, device="cuda").bfloat16()
    weights_TK = torch.full((num_tokens, num_topk), 1 / num_topk, device="cuda", dtype=torch.bfloat16)
    return RoutedBatch(x_TD, routings[0].clone(), weights_TK), routings


def touched_bytes(routings: list[torch.Tensor], num_resident: int, spec: ExpertSpec) -> tuple[float, float]:
    """Mean weight bytes of a step that are (cold, resident), each expert once."""
    unique = [np.unique(ids.cpu().numpy()) for ids in routings]
    cold = statistics.mean(int((ids >= num_resident).sum()) for ids in unique)
    resident = statistics.mean(int((ids < num_resident).sum()) for ids in unique)
    return cold * spec.expert_bytes, resident * spec.expert_bytes


def hbm_read_bytes_per_s() -> float:
    numbers = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    best_s = float("inf")
    for _ in range(5):
        events[0].record()
        numbers.sum()
        events[1].record()
        torch.cuda.synchronize()
        best_s = min(best_s, events[0].elapsed_time(events[1]) * 1e-3)
    return numbers.nbytes / best_s


def measure_ceilings(pool: object, blobs: list[HostBlobs], num_layers: int) -> Ceilings:
    read = prefill_ceilings.measure(prefill_ceilings.Bus(blobs), pool, choose("native").isa)
    return Ceilings(
        read.host_read_bytes_per_s,
        read.host_read_beside_h2d_bytes_per_s + read.h2d_beside_read_bytes_per_s,
        hbm_read_bytes_per_s(),
        measure_round_trip_s(pool, num_layers, SPEC.d_model)[1],
    )


def measure_round_trip_s(pool: object, num_layers: int, d_model: int) -> tuple[float, float]:
    """Seconds a layer in a graph of `num_layers`, one token: all of it, and the hand-over, without the host's call.

    The experts are next to nothing, sixteen rows of F, but 200 KB. Every layer has the same ones, which caches hold. The
    call wakes the host's threads and has them wait for each other twice, which no experts can do without.
    """
    tiny = ExpertSpec(1, d_model, 16)
    layer = host_layers.make_layer(tiny, 0)
    banks = [host_layers.fill_bank(layer, ExpertBank(tiny, "native", pool))] * num_layers
    hybrid = Hybrid(banks, tiny, 0, pool)
    batch, routings = make_batch(1, tiny, 1)
    doorbell = hybrid.hub.doorbell
    layer_s = statistics.median(time_graph(hybrid, batch, routings, num_layers))
    samples = time_graph(hybrid, batch, routings, num_layers, lambda: doorbell.totals.busy_s)
    hybrid.close()
    return layer_s, statistics.median(samples)


def run(
    name: str,
    make: Callable[[], Hybrid | Gathered],
    num_resident: int,
    options: argparse.Namespace,
    top: Ceilings,
    pinned: bool = False,
) -> list[Row]:
    """pinned: the GPU reads the host's memory too."""
    contender, rows = make(), []
    for num_tokens in options.batches:
        batch, routings = make_batch(num_tokens, SPEC, TOPK)
        samples = time_graph(contender, batch, routings, options.layers)
        cold, resident = touched_bytes(routings, num_resident, SPEC)
        read = top.host_and_bus_read_bytes_per_s if pinned else top.host_read_bytes_per_s
        times = (cold / read, resident / top.hbm_read_bytes_per_s)
        bound_s = max(times) + (top.round_trip_s if cold else 0)
        row = Row(
            name,
            num_tokens,
            num_resident,
            cold,
            resident,
            bound_s,
            statistics.median(samples),
            samples,
            contender.share,
        )
        rows.append(row)
        print(
            f"{name:14} batch {num_tokens:3}  {num_resident:3} resident  {row.median_s * 1e6:8.1f} us a layer, "
            f"bound {bound_s * 1e6:8.1f} us, {bound_s / row.median_s:4.0%} of it, share {row.share:.2f}",
            flush=True,
        )
    contender.close()
    del contender
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode.layers", description=__doc__.splitlines()[0]
    )
    numbers = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument(
        "--layers", type=int, default=8, help="MoE layers in a step (default 8, 9.7 GB of experts)"
    )
    parser.add_argument("--batches", **numbers, default=[1, 4, 16], help="tokens in a step (default 1,4,16)")
    parser.add_argument(
        "--residents", **numbers, default=[0, 32, 64, 96, 128], help="experts a layer in slots"
    )
    parser.add_argument("--out", type=Path, help="where the artefact goes (default: bench/results/)")
    options = parser.parse_args()
    pool = hostcompute.make_pool(host_threads())
    layer = host_layers.make_layer(SPEC, 0)
    banks = [host_layers.fill_bank(layer, ExpertBank(SPEC, "native", pool)) for _ in range(options.layers)]
    blobs = [HostBlobs(bank) for bank in banks]
    ranges = [PinnedRange(*b.range_of(0, SPEC.num_experts), b, torch.device("cuda:0")) for b in blobs]
    top = measure_ceilings(pool, blobs, num_layers=48)
    print(
        f"host read {top.host_read_bytes_per_s / 1e9:.0f} GB/s, with the bus "
        f"{top.host_and_bus_read_bytes_per_s / 1e9:.0f} GB/s, HBM read {top.hbm_read_bytes_per_s / 1e9:.0f} GB/s, "
        f"hand-over {top.round_trip_s * 1e6:.1f} us a layer"
    )
    rows = []
    for n in options.residents:
        rows += run("monde", lambda n=n: Hybrid(banks, SPEC, n, pool, blobs), n, options, top, pinned=True)
        if n < SPEC.num_experts:
            rows += run("host computes", lambda n=n: Hybrid(banks, SPEC, n, pool), n, options, top)
    for pinned in ranges:
        pinned.close()
    rows += run("torch bmm", lambda: Gathered(options.layers, SPEC), SPEC.num_experts, options, top)
    configuration = {k: v for k, v in vars(options).items() if k != "out"} | {
        "spec": dataclasses.asdict(SPEC),
        "topk": TOPK,
        "host_threads": pool.num_threads,
        "gpu": torch.cuda.get_device_name(),
    }
    results = {"ceilings": dataclasses.asdict(top), "rows": [dataclasses.asdict(row) for row in rows]}
    print(f"artefact: {artefact.write('decode_layers', configuration, results, options.out)}")


if __name__ == "__main__":
    main()
