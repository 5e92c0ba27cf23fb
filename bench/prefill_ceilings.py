"""What bounds a prompt's expert layers, measured in the same run: the bus, the host, and both at once.

One layer's cold experts, the host's seconds h and the bus' seconds c while the other runs: shares that end together
take 1 / (1 / h + 1 / c), whatever the order. Letters as in monde.core.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
import torch

from bench import host_layers
from hostcompute import ExpertBank, ExpertSpec, _native
from monde.calibration.overlap import nearest_overlap
from monde.planning.cost import ExpertShape
from monde.planning.fit import AlphaBeta
from monde.planning.machines import DESCRIBED
from monde.planning.profile import Curve, ExpertRate, GpuProfile, HardwareProfile
from monde.weights.host import HostBlobs

PIECE_BYTES = 64 << 20
CURVE_TOKENS = (1, 4, 16, 64, 128, 256, 512)


@dataclass(frozen=True)
class Reads:
    """Of the host's memory, by the bus and by the host's threads, each alone and both at once."""

    h2d_bytes_per_s: float
    host_read_bytes_per_s: float
    h2d_beside_read_bytes_per_s: float
    host_read_beside_h2d_bytes_per_s: float


@dataclass(frozen=True)
class Ceilings(Reads):
    """Bytes per second, and operations per second of one large product on the GPU."""

    gpu_flops_per_s: float
    hbm_bytes_per_s: float


@dataclass
class Bus:
    """Copies of experts from pinned memory, all of it in turn, on a stream of their own."""

    blobs: Sequence[HostBlobs]
    target_B: torch.Tensor = field(
        default_factory=lambda: torch.empty(PIECE_BYTES, dtype=torch.uint8, device="cuda")
    )
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)

    def __post_init__(self) -> None:
        per_piece = max(1, PIECE_BYTES // self.blobs[0].range_of(0, 1)[1])
        self.pieces_B = [
            b.run_B(first, min(per_piece, b.spec.num_experts - first))[:PIECE_BYTES]
            for b in self.blobs
            for first in range(0, b.spec.num_experts, per_piece)
        ]
        self._turn = 0

    def queue(self, num_copies: int) -> tuple[torch.cuda.Event, torch.cuda.Event, int]:
        """Starts copying; events around it and the bytes."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        num_bytes = 0
        with torch.cuda.stream(self.stream):
            events[0].record()
            for _ in range(num_copies):
                piece_B = self.pieces_B[self._turn % len(self.pieces_B)]
                self.target_B[: len(piece_B)].copy_(piece_B, non_blocking=True)
                self._turn, num_bytes = self._turn + 1, num_bytes + len(piece_B)
            events[1].record()
        return events[0], events[1], num_bytes

    def bytes_per_s(self, num_copies: int = 40) -> float:
        start, end, num_bytes = self.queue(num_copies)
        end.synchronize()
        return num_bytes / (start.elapsed_time(end) * 1e-3)


def measure(bus: Bus, pool: Any, isa: str) -> Ceilings:
    return Ceilings(*dataclasses.astuple(measure_reads(bus, pool, isa)), *_gpu())


def measure_reads(bus: Bus, pool: Any, isa: str) -> Reads:
    """Of all that the bus copies from, in turn. Half a second."""
    bus.bytes_per_s(4)
    alone = statistics.median(bus.bytes_per_s() for _ in range(3))
    sources = cycle(bus.blobs)

    def read_bytes_per_s() -> float:
        source = next(sources)
        return float(
            _native.read_bytes_per_s_of(pool, isa, source.address, min(1 << 30, source.num_bytes), 1)
        )

    read = statistics.median(read_bytes_per_s() for _ in range(5))
    start, end, num_bytes = bus.queue(160)
    reads = [read_bytes_per_s()]
    while not end.query():
        reads.append(read_bytes_per_s())
    copy_beside = num_bytes / (start.elapsed_time(end) * 1e-3)
    return Reads(alone, read, copy_beside, statistics.median(reads[:-1] or reads))


def _gpu() -> tuple[float, float]:
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    numbers = torch.empty(1 << 29, dtype=torch.float32, device="cuda").normal_()
    return 2 * 8192**3 / _best_s(lambda: a @ a), numbers.nbytes / _best_s(lambda: numbers.sum())


def _best_s(work: object) -> float:
    assert callable(work)
    times = []
    for _ in range(6):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        work()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) * 1e-3)
    return min(times)


class HostAlone:
    """One layer's cold pairs on the host, as its kernels compute them, without a GPU anywhere near."""

    def __init__(
        self, banks: Sequence[ExpertBank], num_tokens: int, routings: Sequence[np.ndarray], first_cold: int
    ):
        spec = banks[0].spec
        self.banks = banks
        self.x_TD = torch.randn(num_tokens, spec.d_model).bfloat16().pin_memory()
        self.y_TD = torch.empty(num_tokens, spec.d_model).pin_memory()
        self.ids = [np.where(ids >= first_cold, ids, -1) for ids in routings]
        self.weights_TK = np.full(routings[0].shape, 1 / routings[0].shape[1], np.float32)

    def step(self, i: int) -> float:
        start_s = time.perf_counter()
        bank, ids = self.banks[i % len(self.banks)], self.ids[i % len(self.ids)]
        bank.forward(self.x_TD, ids, self.weights_TK, out=self.y_TD)
        return time.perf_counter() - start_s

    def alone_s(self, num_steps: int) -> float:
        self.step(0)
        return statistics.median(self.step(i) for i in range(num_steps))

    def beside(self, bus: Bus, num_steps: int, alone_s: float, h2d_bytes_per_s: float) -> tuple[float, float]:
        """Median seconds of a step, and the bus' bytes per second, while both go on."""
        num_copies = max(4, int(1.5 * num_steps * alone_s * h2d_bytes_per_s / PIECE_BYTES))
        start, end, num_bytes = bus.queue(num_copies)
        steps_s = []
        while not end.query():
            steps_s.append(self.step(len(steps_s)))
        return statistics.median(steps_s[:-1] or steps_s), num_bytes / (start.elapsed_time(end) * 1e-3)


def profile_of(
    banks: Sequence[ExpertBank], top: Ceilings, host_slow: float, copy_slow: float
) -> HardwareProfile:
    """A profile of this machine in this very run, host by tokens an expert; the GPU's rate is assumed."""
    spec: ExpertSpec = banks[0].spec
    shape = ExpertShape(spec.d_model, spec.d_ffn, spec.gated)
    seconds = tuple(_expert_s(banks, t) for t in CURVE_TOKENS)
    described = DESCRIBED["h200"]
    assert described.gpu is not None
    h2d = AlphaBeta(10e-6, 1 / top.h2d_bytes_per_s)
    # As panels.cu was measured on an H200: weights at seven eighths of the memory's speed, two fifths of the tensor
    # cores' best, and tiles of 16 rows, however few are filled.
    rate = top.gpu_flops_per_s * 2 / 5
    gpu = ExpertRate(0.0, top.hbm_bytes_per_s * 7 / 8, Curve((1.0, 16.0), (rate / 16, rate)))
    return HardwareProfile(
        machine=described.machine,
        source="bench.prefill_ceilings, in the same run",
        memory_bytes=described.memory_bytes,
        host_read=Curve((1.0,), (top.host_read_bytes_per_s,)),
        host_expert=ExpertRate.from_table(CURVE_TOKENS, seconds, spec.expert_bytes, shape.flops_per_token),
        gpu=GpuProfile(
            memory_bytes=torch.cuda.get_device_properties(0).total_memory,
            expert=gpu,
            h2d=h2d,
            d2h=h2d,
            zero_copy_bytes_per_s=top.h2d_bytes_per_s,
            round_trip=described.gpu.round_trip,
            host_while_copying=nearest_overlap(host_slow, copy_slow),
            gpu_while_copying=described.gpu.gpu_while_copying,
            block_overhead_s=described.gpu.block_overhead_s,
            decode_layer_s=described.gpu.decode_layer_s,
            prompt=described.gpu.prompt,
        ),
        host_call_s=described.host_call_s,
        eager_block_s=described.eager_block_s,
        step_s=described.step_s,
    )


def _expert_s(banks: Sequence[ExpertBank], num_tokens: int) -> float:
    """Of one expert with so many tokens, in a call of several."""
    spec = banks[0].spec
    num_active = min(spec.num_experts, max(2, min(16, 2048 // num_tokens)))
    routings = host_layers.rotating(spec, num_active, num_tokens)
    host = HostAlone(banks, num_tokens, routings, 0)
    return host.alone_s(4) / num_active
