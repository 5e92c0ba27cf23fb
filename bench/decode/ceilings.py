"""What the machine can do, measured in the run: reads, copies, both at once, round trips, steps without experts."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

import hostcompute
from bench import host_layers, prefill_ceilings
from bench.decode import layers, models
from bench.decode.bound import Ceilings
from bench.decode.shapes import Shape
from bench.decode.steps import Case, Decoding, GraphedSteps, StaticSteps
from bench.prefill_ceilings import Reads
from hostcompute import ExpertBank
from hostcompute.backends.select import choose
from monde.device.pinned import PinnedRange
from monde.executors.host import host_threads
from monde.models.decode_cache import add_in_one_launch
from monde.models.norms import fuse_norms
from monde.models.on_gpu import speed_up_on_gpu
from monde.weights.host import HostBlobs


class HostMemory:
    """Read where experts lie in it, in turn: nothing is in a cache, nor, of all layers of a model, its pages' addresses.

    Neighbours of a virtual machine take their share of it, twofold within minutes: it is read around every row.
    """

    def __init__(
        self,
        pool: Any,
        blobs: Sequence[HostBlobs],
        pinned: PinnedRange | None = None,
        target_B: torch.Tensor | None = None,
    ) -> None:
        """blobs: pinned, by `pinned` where nobody else has done it. target_B: where the bus copies to."""
        self.pool, self._pinned = pool, pinned
        self._bus = prefill_ceilings.Bus(blobs) if target_B is None else prefill_ceilings.Bus(blobs, target_B)

    @classmethod
    def of_a_layer(cls, device: torch.device) -> HostMemory:
        """Of Qwen3-30B-A3B's dimensions."""
        pool = hostcompute.make_pool(host_threads())
        layer = host_layers.make_layer(layers.SPEC, 0)
        blobs = HostBlobs(host_layers.fill_bank(layer, ExpertBank(layers.SPEC, "native", pool)))
        return cls(pool, [blobs], PinnedRange(*blobs.range_of(0, layers.SPEC.num_experts), blobs, device))

    def of(self, blobs: Sequence[HostBlobs]) -> HostMemory:
        """With the same threads, and nothing more on the GPU."""
        return HostMemory(self.pool, blobs, target_B=self._bus.target_B)

    def reads(self) -> Reads:
        return prefill_ceilings.measure_reads(self._bus, self.pool, choose("native").isa)


def measure(shape: Shape, memory: HostMemory | None) -> Ceilings:
    """memory: None where the CPU stands in for the GPU: its experts are read from the same memory."""
    if memory is None:
        host = hostcompute.read_bandwidth(num_bytes=1 << 26)
        return Ceilings(host, 0.0, 0.0, 0.0, host, 0.0)
    whole_s, hand_over_s = layers.measure_round_trip_s(memory.pool, shape.full_layers, shape.d_model)
    rest = Ceilings(
        0.0,
        0.0,
        0.0,
        0.0,
        hbm_read_bytes_per_s=layers.hbm_read_bytes_per_s(),
        round_trip_s=hand_over_s,
        own_round_trip_s=whole_s,
    )
    return with_reads(rest, memory.reads())


def with_reads(top: Ceilings, reads: Reads) -> Ceilings:
    return dataclasses.replace(
        top,
        host_read_bytes_per_s=reads.host_read_bytes_per_s,
        h2d_bytes_per_s=reads.h2d_bytes_per_s,
        overlapped_host_bytes_per_s=reads.host_read_beside_h2d_bytes_per_s,
        overlapped_h2d_bytes_per_s=reads.h2d_beside_read_bytes_per_s,
    )


class Floor:
    """The step without experts, in one graph where there is a GPU."""

    def __init__(
        self, config: PretrainedConfig, dense: dict[str, torch.Tensor], device: torch.device, num_steps: int
    ) -> None:
        self.model = models.build(config, dense, device, models.nothing)
        fuse_norms(self.model)  # as monde does: a floor that nobody is above
        speed_up_on_gpu(self.model, device)
        self._num_steps = num_steps
        self._samples: dict[Case, list[float]] = {}

    def samples_s(self, case: Case) -> list[float]:
        if case not in self._samples:
            make = GraphedSteps if self.model.device.type == "cuda" else StaticSteps
            with torch.no_grad():
                steps = make(self.model, case, add_in_one_launch)
            decoding = Decoding(steps, self.model.config.vocab_size, case.batch, self.model.device)
            decoding.run(4)
            self._samples[case] = decoding.run(self._num_steps)
        return self._samples[case]

    def median_s(self, case: Case) -> float:
        return statistics.median(self.samples_s(case))
