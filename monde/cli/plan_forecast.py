"""What `monde plan` is asked, and the forecasts that answer it: of any budget, format and machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from monde.core import Placement
from monde.models.outline import Outlined, outline_of
from monde.planning.budget import BudgetError, LayerSize, MemoryPlan, Spread, plan_memory, smallest_gpu_bytes
from monde.planning.forecast import Speed, forecast_decode, forecast_prefill, place_for_decode
from monde.planning.formats import FORMATS, WeightFormat, best_format, format_of
from monde.planning.played import Played, play
from monde.planning.profile import HardwareProfile
from monde.routing.heat import Heat
from monde.routing.trace import Trace


@dataclass(frozen=True)
class Forecast:
    plan: MemoryPlan
    decode: Speed
    prefill: Speed


@dataclass(frozen=True)
class FormatVerdict:
    """A model in one format under the budget asked for. forecast is None where it does not fit, error says why.

    smallest_gpu_bytes: the least gpu_memory that works with this host_memory; None without a GPU, or where none does.
    """

    format: WeightFormat
    forecast: Forecast | None
    error: BudgetError | None
    smallest_gpu_bytes: int | None


@dataclass(frozen=True)
class Question:
    """host_bytes: of experts on the host, and of everything where there is no GPU."""

    model: str
    profile: HardwareProfile
    host_bytes: int
    context: int
    batch: int
    prompt: int
    heat_file: Path | None = None

    @property
    def on_gpu(self) -> bool:
        return self.profile.gpu is not None

    @cached_property
    def stored_format(self) -> WeightFormat:
        """Errors: ValueError for weights that cannot be run as they are stored."""
        return format_of(str(self.outlined(None).stored_dtype).removeprefix("torch."))

    def outlined(self, weight_format: WeightFormat | None) -> Outlined:
        """None: as stored. Errors: as outline_of."""
        dtype = None if weight_format is None else getattr(torch, weight_format.dtype)
        heat = None if self.heat_file is None else Heat.load(self.heat_file)
        return outline_of(self.model, self.context, self.batch, heat, self.on_gpu, dtype)

    def forecast(
        self, outlined: Outlined, gpu_bytes: int, profile: HardwareProfile | None = None
    ) -> Forecast:
        """On this machine, or on another one like it. Errors: BudgetError."""
        profile = profile or self.profile
        # Residents follow the routing by default, where host memory lets them.
        memory = plan_memory(
            outlined.size,
            self.on_gpu,
            gpu_bytes,
            self.host_bytes,
            wants_moves=self.on_gpu,
            spread=self._spread(outlined, profile),
        )
        placements = self._placements(outlined, outlined.size.layers, memory.slots_bytes, profile)
        if outlined.halves is None:
            decode = forecast_decode(outlined.outline, placements, profile, self.batch, self.context)
            return Forecast(
                memory, decode, forecast_prefill(outlined.outline, placements, profile, self.prompt)
            )
        halves = outlined.halves
        encoders, decoders = (
            [placements[i] for i in ids] for ids in (halves.encoder_ids, halves.decoder_ids)
        )
        # A step reads its own keys and values and those of the prompt, which are as large.
        seen = self.context + self.prompt
        decode = forecast_decode(halves.decoder, decoders, profile, self.batch, seen)
        return Forecast(memory, decode, forecast_prefill(halves.encoder, encoders, profile, self.prompt))

    def _placements(
        self, outlined: Outlined, layers: Sequence[LayerSize], slots_bytes: int, profile: HardwareProfile
    ) -> tuple[Placement, ...]:
        return place_for_decode(outlined.outline, layers, slots_bytes, profile, self.batch)

    def _spread(self, outlined: Outlined, profile: HardwareProfile) -> Spread:
        """How many slots each layer gets, as loading would give them out."""

        def spread(layers: tuple[LayerSize, ...], free_bytes: int) -> tuple[int, ...]:
            return tuple(p.num_resident for p in self._placements(outlined, layers, free_bytes, profile))

        return spread

    def played(self, outlined: Outlined, forecast: Forecast, trace: Path) -> Played:
        """A recorded routing under the forecast's placement. Errors: ValueError for a trace of another model."""
        if outlined.halves is not None:
            raise ValueError(
                "--routing: a step of an encoder-decoder runs half of its layers, which is not played; leave --routing out"
            )
        recorded = Trace.load(trace)
        recorded.check(f"--routing {trace}", [len(layer.popularity_E) for layer in outlined.outline.layers])
        slots_bytes = forecast.plan.slots_bytes
        placements = self._placements(outlined, outlined.size.layers, slots_bytes, self.profile)
        return play(recorded.steps, outlined.outline, placements, self.profile, self.context)

    def verdict(self, weight_format: WeightFormat, gpu_bytes: int) -> FormatVerdict:
        outlined = self.outlined(weight_format)
        smallest = None
        if self.on_gpu:
            spread = self._spread(outlined, self.profile)
            smallest = smallest_gpu_bytes(outlined.size, self.host_bytes, spread)
        try:
            return FormatVerdict(weight_format, self.forecast(outlined, gpu_bytes), None, smallest)
        except BudgetError as error:
            return FormatVerdict(weight_format, None, error, smallest)

    def verdicts(self, gpu_bytes: int) -> list[FormatVerdict]:
        """Every format, the most precise first."""
        return [self.verdict(weight_format, gpu_bytes) for weight_format in FORMATS]

    def best(self, verdicts: Sequence[FormatVerdict]) -> WeightFormat | None:
        return best_format(self.stored_format, [v.format for v in verdicts if v.forecast is not None])
