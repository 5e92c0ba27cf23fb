"""What the machine can do, measured in the run: reads, copies, both at once, round trips, steps without experts."""

from __future__ import annotations

import statistics
import threading
import time

import torch
from transformers import PretrainedConfig

import hostcompute
from bench.decode import layers, models
from bench.decode.bound import Ceilings
from bench.decode.shapes import Shape
from bench.decode.steps import Case, Decoding, GraphedSteps, StaticSteps
from hostcompute.arrays import as_host_array
from monde.executors.host import host_threads

_COPY_BYTES = 1 << 26


def measure(shape: Shape, device: torch.device, read_bytes: int) -> Ceilings:
    """read_bytes: memory that the read test goes through."""
    num_threads = host_threads() if device.type == "cuda" else None
    host = hostcompute.read_bandwidth(num_threads, read_bytes)
    if device.type != "cuda":  # the CPU stands in for the GPU: its experts are read from the same memory
        return Ceilings(host, 0.0, 0.0, 0.0, host, 0.0)
    pool = hostcompute.make_pool(num_threads)
    h2d, over_host, over_h2d = _copies_and_reads(num_threads, read_bytes)
    return Ceilings(
        host_read_bytes_per_s=host,
        h2d_bytes_per_s=h2d,
        overlapped_host_bytes_per_s=over_host,
        overlapped_h2d_bytes_per_s=over_h2d,
        hbm_read_bytes_per_s=layers.hbm_read_bytes_per_s(),
        round_trip_s=layers.measure_round_trip_s(pool, shape.full_layers, shape.d_model),
    )


def _copies_and_reads(num_threads: int | None, read_bytes: int) -> tuple[float, float, float]:
    """Bytes per second of pinned copies alone; of host reads and of copies while both run."""
    pinned_B = torch.zeros(4 * _COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there_B = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")

    def copy_some() -> int:
        for i in range(8):
            source = pinned_B[i % 4 * _COPY_BYTES :][:_COPY_BYTES]
            there_B.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return 8 * _COPY_BYTES

    copy_some()
    start_s = time.perf_counter()
    alone = sum(copy_some() for _ in range(4)) / (time.perf_counter() - start_s)
    read = torch.ones(read_bytes, dtype=torch.uint8)
    array = as_host_array(read, "read")
    found: list[float] = []

    def read_all() -> None:
        found.append(hostcompute.probe.read_bandwidth_of(array, read_bytes, num_threads, repeats=20))

    reader = threading.Thread(target=read_all)
    start_s, copied = time.perf_counter(), 0
    reader.start()
    while reader.is_alive():
        copied += copy_some()
    return alone, found[0], copied / (time.perf_counter() - start_s)


class Floor:
    """The step without experts, in one graph where there is a GPU."""

    def __init__(
        self, config: PretrainedConfig, dense: dict[str, torch.Tensor], device: torch.device, num_steps: int
    ) -> None:
        self.model = models.build(config, dense, device, models.nothing)
        self._num_steps = num_steps
        self._samples: dict[Case, list[float]] = {}

    def samples_s(self, case: Case) -> list[float]:
        if case not in self._samples:
            make = GraphedSteps if self.model.device.type == "cuda" else StaticSteps
            with torch.no_grad():
                steps = make(self.model, case)
            decoding = Decoding(steps, self.model.config.vocab_size, case.batch, self.model.device)
            decoding.run(4)
            self._samples[case] = decoding.run(self._num_steps)
        return self._samples[case]

    def median_s(self, case: Case) -> float:
        return statistics.median(self.samples_s(case))
