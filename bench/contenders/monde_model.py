"""monde under a budget: the model handed to monde.offload, decode steps as plain calls of the model."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import monde
from bench.contenders.base import Demand, DoesNotFitError, Setting, decoding_of, free_memory, peak_gpu_bytes
from bench.decode import models
from bench.decode.bound import Traffic, expected_traffic
from bench.decode.skew import heat_of
from bench.decode.steps import Case, Decoding, StaticSteps, generated
from monde.models.experts import find_experts
from monde.models.sizing import plan_for, resolve_device
from monde.planning.budget import BudgetError, MemoryPlan
from monde.sizes import format_bytes
from monde.weights.host import HostBlobs

NUM_WARM_UPS = 24  # eager steps, warm-ups and capture come first
_MAX_SETTLING_STEPS = 240
_QUIET_STEPS = 12  # without a swap: residents have settled


def settings_of(setting: Setting, budget: str, cases: list[Case], residency: str) -> dict[str, Any]:
    """Arguments of monde.offload. "all": what holds every expert. Errors: DoesNotFitError."""
    common: dict[str, Any] = {
        "device": str(setting.device),
        "max_context": max(case.num_positions for case in cases),
        "max_batch": max(case.batch for case in cases),
        "residency": residency,
    }
    if budget != "all":
        return common | {"gpu_memory": budget}
    plan = plan_of(setting, common | {"gpu_memory": None if setting.device.type == "cuda" else 0})
    gpu_bytes = plan.gpu_used_bytes - plan.slots_bytes + plan.size.all_slots_bytes
    if setting.device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(setting.device).total_memory
        if gpu_bytes > total_bytes:
            raise DoesNotFitError(
                f"all resident takes {format_bytes(gpu_bytes)} of {format_bytes(total_bytes)}"
            )
    return common | {"gpu_memory": gpu_bytes, "residency": "static"}


def plan_of(setting: Setting, settings: dict[str, Any]) -> MemoryPlan:
    """What goes where, without loading anything. Errors: DoesNotFitError."""
    config = monde.MondeConfig(**settings)
    try:
        return plan_for(setting.outline, find_experts(setting.outline), config, resolve_device(config))
    except BudgetError as error:
        raise DoesNotFitError(str(error)) from error


class MondeModel:
    """heat_p_LE: popularity that the first residents are chosen by."""

    group = "monde"

    def __init__(
        self, setting: Setting, budget: str, cases: list[Case], residency: str, heat_p_LE: NDArray[np.float64]
    ) -> None:
        self.name, self.budget, self.num_layers = "monde", budget, setting.shape.num_layers
        self.note = ""
        self._setting = setting
        settings = settings_of(setting, budget, cases, residency)
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = models.build(setting.config, setting.dense, setting.device, models.windowed)
        with tempfile.TemporaryDirectory() as folder:
            heat = Path(folder) / "heat.safetensors"
            heat_of(heat_p_LE, batch=1).save(heat)
            try:
                self.model: Any = monde.offload(model, heat_file=heat, **settings)
            except BudgetError as error:
                raise DoesNotFitError(str(error)) from error
        self.engine = self.model.monde
        self._current: tuple[Case, Decoding] | None = None

    # ---- decode ----
    @torch.no_grad()
    def decoding(self, demand: Demand) -> Decoding:
        if self._current is None or self._current[0] != demand.case:
            self._current = None
            free_memory()
            steps = StaticSteps(self.model, demand.case)
            self._current = (demand.case, decoding_of(steps, self.model, demand.case))
        decoding = self._current[1]
        self._follow(demand, decoding)
        decoding.run(NUM_WARM_UPS)
        decoding.restart()
        self.engine.reset_counters()
        return decoding

    def _follow(self, demand: Demand, decoding: Decoding) -> None:
        """To the state that long use would lead to: heat as the demand makes it, and swaps without a limit until none
        is left. A heat file does the same at loading."""
        residency = self.engine.residency
        if not self.engine.plan.moves:
            return
        settings, share = residency.settings, residency.swap_share
        residency.tracker.load(heat_of(demand.p_LE, demand.case.batch))
        residency.settings, residency.swap_share = dataclasses.replace(settings, max_swaps=1 << 20), 1e9
        for _ in range(_MAX_SETTLING_STEPS // _QUIET_STEPS):
            before = residency.num_swaps
            decoding.run(_QUIET_STEPS)
            if residency.num_swaps == before:
                break
        residency.settings, residency.swap_share = settings, share

    def generate_samples(self, demand: Demand, num_steps: int) -> list[float]:
        """Seconds a step of model.generate."""
        self.engine.reset_counters()
        return generated(self.model, demand.case, num_steps, self.engine.reset_counters)

    # ---- what it did ----
    @property
    def host_blobs(self) -> list[HostBlobs]:
        """Of layers whose experts are all pinned on the host."""
        fetchable = map(self.engine.residency.fetchable, range(len(self.engine.layers)))
        return [
            blobs
            for blobs in fetchable
            if blobs is not None
            and blobs.place_of_expert_E is None
            and len(blobs.bank.loaded_experts) == blobs.spec.num_experts
        ]

    @property
    def resident_LE(self) -> NDArray[np.bool_]:
        tables = [layer.table.placement.slot_of_expert_E for layer in self.engine.layers]
        return np.array(tables) >= 0

    def traffic(self, demand: Demand, num_steps: int) -> Traffic:
        return expected_traffic(demand.p_LE, self.resident_LE, demand.case.batch)

    def figures(self, num_steps: int) -> dict[str, Any]:
        counters = self.engine.counters()
        told = {"hit_rate": counters.hit_rate, "num_steps": counters.num_steps}
        per_step = {
            f"{name}_per_step": value / max(counters.num_steps, 1)
            for name, value in dataclasses.asdict(counters).items()
            if name != "num_steps"
        }
        report = self.engine.load_report
        return (
            told
            | per_step
            | {
                "load_s": report.seconds_s,
                "num_resident_experts": report.num_resident_experts,
                "plan": self.engine.plan.explain(),
                "peak_gpu_bytes": peak_gpu_bytes(),
            }
        )

    def close(self) -> None:
        self._current = None
        self.engine.close()
        del self.model, self.engine
        free_memory()
