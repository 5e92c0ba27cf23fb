"""transformers with every expert on the GPU: as generate runs it, and as one CUDA graph."""

from __future__ import annotations

from typing import Any

import torch

from bench.contenders.base import Demand, DoesNotFitError, Setting, decoding_of, free_memory, peak_gpu_bytes
from bench.decode import models
from bench.decode.bound import Traffic, expected_traffic
from bench.decode.steps import Case, Decoding, GraphedSteps, GrowingSteps, generated
from monde.sizes import format_bytes

WAYS = ("eager", "graph batched_mm", "graph grouped_mm")
NUM_WARM_UPS = 4


class ResidentModel:
    """One model for all ways. Errors: DoesNotFitError where the GPU cannot hold it."""

    def __init__(self, setting: Setting) -> None:
        need_bytes = setting.shape.num_layers * setting.shape.num_experts * setting.shape.expert_bytes
        if setting.device.type == "cuda":
            free_memory()
            free_bytes = torch.cuda.mem_get_info(setting.device)[0]
            if need_bytes > free_bytes:
                wanted, have = format_bytes(need_bytes), format_bytes(free_bytes)
                raise DoesNotFitError(f"experts take {wanted} and the GPU has {have} free")
            torch.cuda.reset_peak_memory_stats()
        make = models.on_device(setting.device)
        self.setting = setting
        self.model: Any = models.build(setting.config, setting.dense, setting.device, make)

    def close(self) -> None:
        del self.model
        free_memory()


class Resident:
    """transformers in one of WAYS. Eager: the way of generate's decode, on the cache that it makes by itself."""

    budget = ""

    def __init__(self, held: ResidentModel, way: str) -> None:
        self._held, self._way = held, way
        self.name, self.group = f"transformers, {way}", f"resident {way.split()[0]}"
        self.num_layers = held.setting.shape.num_layers
        self.note = "all experts on the GPU"
        self._current: tuple[Case, Decoding] | None = None

    @torch.no_grad()
    def decoding(self, demand: Demand) -> Decoding:
        on_gpu = self._held.setting.device.type == "cuda"
        if self._way != "eager" and not on_gpu:
            raise DoesNotFitError("a CUDA graph needs a GPU")
        # generate changes grouped_mm, the default, to batched_mm for its decode steps on a GPU.
        way = self._way.split()[-1] if self._way != "eager" else "batched_mm" if on_gpu else "grouped_mm"
        if self._current is None or self._current[0] != demand.case:
            self._current = None
            free_memory()
            self._held.model.set_experts_implementation(way)
            make = GrowingSteps if self._way == "eager" else GraphedSteps
            try:
                steps = make(self._held.model, demand.case)
            except torch.OutOfMemoryError as error:
                raise DoesNotFitError(f"out of GPU memory: {str(error).splitlines()[0]}") from error
            self._current = (demand.case, decoding_of(steps, self._held.model, demand.case))
        self._held.model.set_experts_implementation(way)
        decoding = self._current[1]
        decoding.run(NUM_WARM_UPS)
        decoding.restart()
        return decoding

    def generate_samples(self, demand: Demand, num_steps: int) -> list[float]:
        self._held.model.set_experts_implementation("grouped_mm")
        return generated(self._held.model, demand.case, num_steps, lambda: None)

    def traffic(self, demand: Demand, num_steps: int) -> Traffic:
        return expected_traffic(demand.p_LE, demand.p_LE >= 0, demand.case.batch)

    def figures(self, num_steps: int) -> dict[str, Any]:
        return {"peak_gpu_bytes": peak_gpu_bytes()}

    def close(self) -> None:
        self._current = None
        free_memory()
