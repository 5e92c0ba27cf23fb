"""accelerate's CPU offload of the experts: a layer's weights are copied to the GPU whenever the layer runs."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import cpu_offload

from bench.contenders.base import Demand, Setting, decoding_of, free_memory, shortened
from bench.decode import models
from bench.decode.bound import Traffic, expected_traffic
from bench.decode.steps import Decoding, GrowingSteps


class Accelerated:
    """accelerate.cpu_offload on every experts module: the hooks that "cpu" in a device_map installs."""

    name, group, budget = "accelerate, experts on the CPU", "offload", ""

    def __init__(self, setting: Setting, num_layers: int) -> None:
        self.num_layers = min(num_layers, setting.shape.num_layers)
        self.note = (
            "pageable weights, as from_pretrained leaves them; eager, on the cache that generate makes"
        )
        config = shortened(setting.config, self.num_layers)
        self.model: Any = models.build(config, setting.dense, setting.device, models.in_host_memory)
        if setting.device.type == "cuda":
            self.model.set_experts_implementation("batched_mm")
        for _, experts in models.moe_blocks(self.model):
            cpu_offload(experts, execution_device=setting.device)

    @torch.no_grad()
    def decoding(self, demand: Demand) -> Decoding:
        decoding = decoding_of(GrowingSteps(self.model, demand.case), self.model, demand.case)
        decoding.run(1)
        return decoding

    def traffic(self, demand: Demand, num_steps: int) -> Traffic:
        p_LE = demand.p_LE[: self.num_layers]
        return expected_traffic(p_LE, p_LE < 0, demand.case.batch)

    def figures(self, num_steps: int) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        del self.model
        free_memory()
