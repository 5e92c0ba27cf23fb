"""What the GPU and its bus can do, alone and while the host computes. Needs CUDA and CuPy.

Letters: T tokens, A active experts of one call, S slots, D model dim.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hostcompute import ExpertBank, ExpertSpec
from monde.calibration.copies import Copies, fit_copies
from monde.calibration.graph import capture
from monde.calibration.host import TOKENS, HostProbes, fill, rate_of, rotating
from monde.calibration.overlap import overlap_of
from monde.calibration.prompts import PROMPT_TOKENS, PromptLayers, resident_products
from monde.calibration.samples import Probe, Samples, Timings, repeated, seconds_of
from monde.core import Placement, RoutedBatch
from monde.executors.decode import DecodeExecutor, DecodeHub, why_not_decode
from monde.executors.device_part import DevicePart
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import LayerPieces, PrefillSize
from monde.planning.fit import AlphaBeta, fit_alpha_beta
from monde.planning.machines import DESCRIBED
from monde.planning.profile import GpuProfile
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable

_NUM_ACTIVE = 8
_FEW, _MANY = 8, 32  # experts of a layer that are timed, to tell what a layer takes from what its experts do
_MAX_DECODE = 16  # tokens of an expert up to which decode's kernels are timed, beyond them grouped products
_TRIP_TOKENS = (1, 4, 16, 64)
_TRIP_LAYERS = 24
_STEP_LAYERS = 16  # of a captured step at least: replaying it costs something too
_NUM_REPLAYS = 20


@dataclass(frozen=True)
class GpuFits:
    """The lines through what was timed. layers: seconds of a layer over its active experts, for each of TOKENS."""

    h2d: AlphaBeta
    d2h: AlphaBeta
    round_trip: AlphaBeta
    layers: tuple[AlphaBeta, ...]

    @classmethod
    def of(cls, d_model: int, samples: dict[str, Samples]) -> GpuFits:
        return cls(
            fit_copies("h2d", samples),
            fit_copies("d2h", samples),
            fit_trips(d_model, samples),
            tuple(layer_of(t, samples) for t in TOKENS),
        )

    def named(self) -> dict[str, AlphaBeta]:
        layers = {
            f"GPU layers of {t} tokens an expert": fit for t, fit in zip(TOKENS, self.layers, strict=True)
        }
        return {
            "copies to the GPU": self.h2d,
            "copies from the GPU": self.d2h,
            "round trips": self.round_trip,
            **layers,
        }


class GpuProbes:
    """Slots for all experts of the host's bank on one GPU, and what is timed on them."""

    def __init__(self, host: HostProbes, pool: Any, device: torch.device, copied_bytes: int) -> None:
        why_not = why_not_decode(device, host.bank.choice)
        if why_not:
            raise ValueError(f"calibrate: {why_not}")
        self.host, self.pool, self.device = host, pool, device
        self.spec = host.spec
        self.copies = Copies(copied_bytes, device)
        self.slots = ExpertSlots(self.spec, self.spec.num_experts, device)
        # Any numbers do; zeros would take less power.
        self.slots.blobs_SB.view(torch.bfloat16).normal_(std=0.02)
        table = SlotTable(Placement(tuple(range(self.spec.num_experts))), device)
        size = PrefillSize.of([self.spec], torch.bfloat16.itemsize, TOKENS[-1], _MANY)
        self.prefill = PrefillHub(device, size, DESCRIBED["h200"])  # all are resident: nothing is planned
        self.part = DevicePart(self.spec, self.slots, LayerPieces.of(self.spec), self.prefill)
        self.prompts = PromptLayers(host.bank, self.slots, device)
        self.hub = DecodeHub([self.spec], [host.bank], torch.bfloat16, device, pool)
        heat_E = torch.zeros(self.spec.num_experts, device=device)
        self.decode = DecodeExecutor(0, self.spec, self.slots, table, heat_E, self.hub)

    def probes(self) -> list[Probe]:
        trips = [Probe(_trip_name(t), partial(self._round_trip, t)) for t in _TRIP_TOKENS]
        layers = [Probe(_layer_name(t, a), partial(self._layer, t, a)) for t in TOKENS for a in (_FEW, _MANY)]
        pairs = [Probe("host while copying", self._host_pair), Probe("GPU while copying", self._gpu_pair)]
        return [*self.copies.probes(), *layers, *self.prompts.probes(), *trips, *pairs]

    def fits(self, samples: dict[str, Samples]) -> GpuFits:
        return GpuFits.of(self.spec.d_model, samples)

    def profile(
        self, fits: GpuFits, samples: dict[str, Samples], block_overhead_s: Callable[[float], float]
    ) -> GpuProfile:
        """block_overhead_s: what a captured block takes beside reading at so many bytes a second."""
        layers = fits.layers
        expert = rate_of(self.spec, expert_s([layer.s_per_unit for layer in layers]))
        trip_s = float(fits.round_trip.seconds(PROMPT_TOKENS * self.spec.d_model * torch.bfloat16.itemsize))
        host_s = trip_s + self.prompts.num_active * self.host.expert_s(samples, PROMPT_TOKENS)
        copies_s = self.prompts.num_active * float(fits.h2d.seconds(self.spec.expert_bytes))
        of_decode = [layer.alpha_s for t, layer in zip(TOKENS, layers, strict=True) if t <= _MAX_DECODE]
        return GpuProfile(
            memory_bytes=torch.cuda.get_device_properties(self.device).total_memory,
            expert=expert,
            h2d=fits.h2d,
            d2h=fits.d2h,
            zero_copy_bytes_per_s=self.copies.zero_copy_bytes_per_s(samples),
            round_trip=fits.round_trip,
            host_while_copying=overlap_of("host", samples),
            gpu_while_copying=overlap_of("GPU", samples),
            block_overhead_s=block_overhead_s(expert.bytes_per_s),
            decode_layer_s=statistics.median(of_decode),
            prompt=self.prompts.launches(samples, host_s, copies_s),
        )

    def close(self) -> None:
        self.prompts.close()
        self.prefill.close()
        self.hub.close()

    # ---- experts ----
    def _layer(self, num_tokens: int, num_active: int) -> Timings:
        step, num_layers = self._gpu_step(num_tokens, num_active)
        samples = repeated(step, self.host.sample_s)
        return {_layer_name(num_tokens, num_active): [s / num_layers for s in samples]}

    def _gpu_step(self, num_tokens: int, num_active: int) -> tuple[Callable[[], None], int]:
        """A step that waits for its end, every expert at least once, A of them a layer; and how many layers that is."""
        routings = rotating(self.spec.num_experts, num_active, num_tokens)
        routings *= -(-_STEP_LAYERS // len(routings))
        if num_tokens <= _MAX_DECODE:
            batches = [_batch(ids_TA, self.spec.d_model, self.device) for ids_TA in routings]
            graph = capture(lambda: [self.decode.forward(batch) for batch in batches])
        else:
            launches = [resident_products(self.part, num_tokens, np.array(ids[0]))[0] for ids in routings]
            graph = capture(lambda: [launch() for launch in launches])
        stream = torch.cuda.current_stream(self.device)

        def step() -> None:
            graph.replay()
            stream.synchronize()  # of this stream alone: copies may run beside it

        return step, len(routings)

    # ---- the way to the host and back ----
    def _round_trip(self, num_tokens: int) -> Timings:
        """Layers whose experts are next to nothing, in one graph."""
        spec = ExpertSpec(_NUM_ACTIVE, self.spec.d_model, 16)
        banks = [fill(ExpertBank(spec, "native", self.pool)) for _ in range(_TRIP_LAYERS)]
        hub = DecodeHub([spec] * _TRIP_LAYERS, banks, torch.bfloat16, self.device, self.pool)
        heat_E = torch.zeros(spec.num_experts, device=self.device)
        table = SlotTable(Placement((-1,) * spec.num_experts), self.device)
        layers = [DecodeExecutor(idx, spec, None, table, heat_E, hub) for idx in range(_TRIP_LAYERS)]
        ids_T1 = torch.arange(num_tokens)[:, None] % spec.num_experts
        batch = _batch(ids_T1, spec.d_model, self.device)
        graph = capture(lambda: [layer.forward(batch) for layer in layers])
        stream = torch.cuda.current_stream(self.device)

        def step() -> None:
            hub.before_replay()
            graph.replay()
            stream.synchronize()

        step()
        samples = [seconds_of(step) / _TRIP_LAYERS for _ in range(_NUM_REPLAYS)]
        hub.check()
        hub.close()
        for bank in banks:
            bank.close()
        return {_trip_name(num_tokens): samples}

    # ---- two at once ----
    def _host_pair(self) -> Timings:
        few, _ = self.host.few_and_more(1)
        return self.copies.beside("host", self.host.step(1, few))

    def _gpu_pair(self) -> Timings:
        step, _ = self._gpu_step(1, _FEW)
        return self.copies.beside("GPU", step)


def _batch(ids_TA: Tensor, d_model: int, device: torch.device) -> RoutedBatch:
    num_tokens, num_active = ids_TA.shape
    x_TD = torch.randn(num_tokens, d_model, device=device).bfloat16()
    weights_TA = torch.full((num_tokens, num_active), 1 / num_active, device=device)
    return RoutedBatch(x_TD, ids_TA.to(device), weights_TA)


def fit_trips(d_model: int, samples: dict[str, Samples]) -> AlphaBeta:
    """Over the bytes of one way."""
    row_bytes = d_model * torch.bfloat16.itemsize
    timed = [(t * row_bytes, s) for t in _TRIP_TOKENS for s in samples[_trip_name(t)].all_s]
    return fit_alpha_beta([size for size, _ in timed], [s for _, s in timed])


def layer_of(num_tokens: int, samples: dict[str, Samples]) -> AlphaBeta:
    """Seconds of a layer over its active experts."""
    timed = [(a, s) for a in (_FEW, _MANY) for s in samples[_layer_name(num_tokens, a)].all_s]
    return fit_alpha_beta([a for a, _ in timed], [s for _, s in timed])


def expert_s(slopes: Sequence[float]) -> tuple[float, ...]:
    """Seconds of an expert by tokens, ascending, from what one more of them cost.

    Where launching a layer takes longer than its experts, more of them cost nothing that shows: those take at most
    what they take with the next larger number of tokens. Errors: ValueError where the largest number shows nothing.
    """
    if slopes[-1] <= 0:
        raise ValueError(
            f"calibrate: {_MANY} experts of {TOKENS[-1]} tokens on the GPU took no longer than {_FEW}; measure again "
            "when nothing else uses the GPU"
        )
    seconds = list(slopes)
    for i in reversed(range(len(seconds) - 1)):
        seconds[i] = seconds[i] if seconds[i] > 0 else seconds[i + 1]
    return tuple(seconds)


def _layer_name(num_tokens: int, num_active: int) -> str:
    return f"GPU layer of {num_active} experts, {num_tokens} tokens each"


def _trip_name(num_tokens: int) -> str:
    return f"round trip, {num_tokens} tokens"
