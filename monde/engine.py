"""Everything monde holds for one model: its layers, host banks, device slots, budget and counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from hostcompute import ExpertBank, ExpertSpec, make_pool
from hostcompute.backends.select import BackendChoice
from monde.config import MondeConfig
from monde.core import Counters, LoadReport, Placement
from monde.executors.gpu import GpuExecutor
from monde.executors.host import HostExecutor, HostTotals
from monde.layer import MoELayer
from monde.planning.budget import MemoryPlan
from monde.weights.host import from_host_arrays
from monde.weights.slots import ExpertSlots
from monde.weights.staging import Staging


class Engine:
    """Owner of the experts of one model; `model.monde`.

    Built empty from the layers' specs and a plan that fits; experts arrive one by one, by `load_expert`.
    """

    load_report: LoadReport

    def __init__(
        self, config: MondeConfig, specs: Sequence[ExpertSpec], plan: MemoryPlan, device: torch.device
    ) -> None:
        self.config, self.plan, self.device = config, plan, device
        self.staging = Staging(pinned=device.type == "cuda")
        self._pool = None if config.num_threads is None else make_pool(config.num_threads)
        self.layers = [self._build_layer(spec, n) for spec, n in zip(specs, plan.num_resident_L, strict=True)]

    def _build_layer(self, spec: ExpertSpec, num_resident: int) -> MoELayer:
        placement = first_experts(spec.num_experts, num_resident)
        host = HostExecutor(ExpertBank(spec, self.config.cpu_backend, self._pool), self.staging)
        if num_resident == 0:
            return MoELayer(spec, placement, host)
        slots = ExpertSlots(spec, num_resident, self.device)
        return MoELayer(spec, placement, host, GpuExecutor(slots, placement, self.device))

    # ---- weights ----
    def load_expert(self, layer_idx: int, expert_id: int, arrays: Mapping[str, Tensor]) -> None:
        """Copy one expert to where the placement wants it. `arrays` are the keywords of ExpertBank.load."""
        layer = self.layers[layer_idx]
        slot = layer.placement.slot_of_expert_E[expert_id]
        if slot >= 0 and layer.device is not None:
            layer.device.slots.write(slot, arrays)
        else:
            layer.host.bank.load(expert_id, **arrays)

    def export_expert(self, layer_idx: int, expert_id: int) -> dict[str, Tensor]:
        """One expert as `load_expert` took it, bit for bit, on the CPU."""
        layer = self.layers[layer_idx]
        slot = layer.placement.slot_of_expert_E[expert_id]
        if slot >= 0 and layer.device is not None:
            return {role: tensor.cpu() for role, tensor in layer.device.slots.read(slot).items()}
        return from_host_arrays(layer.host.bank.export(expert_id))

    # ---- what happened ----
    @property
    def host_choice(self) -> BackendChoice:
        """Which host backend and ISA run, and why."""
        return self.layers[0].host.bank.choice

    def counters(self) -> Counters:
        """Sums since the last reset."""
        totals = [layer.host.totals for layer in self.layers]
        num_resident_pairs = sum(layer.device.num_pairs for layer in self.layers if layer.device is not None)
        return Counters(
            num_steps=max(layer.num_calls for layer in self.layers),
            num_pairs=sum(t.num_pairs for t in totals) + num_resident_pairs,
            num_resident_pairs=num_resident_pairs,
            host_weight_bytes=sum(t.weight_bytes for t in totals),
            h2d_bytes=sum(t.h2d_bytes for t in totals),
            d2h_bytes=sum(t.d2h_bytes for t in totals),
            host_busy_s=sum(t.busy_s for t in totals),
        )

    def reset_counters(self) -> None:
        for layer in self.layers:
            layer.num_calls = 0
            layer.host.totals = HostTotals()
            if layer.device is not None:
                layer.device.num_pairs = 0

    # ---- life ----
    def close(self) -> None:
        """Give the host memory back; the model cannot run afterwards. Closing twice is fine."""
        for layer in self.layers:
            layer.host.bank.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copied model shares the experts of the original."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model run by monde cannot be pickled; use save_pretrained and load it again")


def first_experts(num_experts: int, num_resident: int) -> Placement:
    """The first `num_resident` experts have the slots: without heat to go by, any choice is as good."""
    return Placement(tuple(e if e < num_resident else -1 for e in range(num_experts)))
