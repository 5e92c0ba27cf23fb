"""Everything monde holds for one model: its layers, host banks, device slots, budget and counters."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from hostcompute import ExpertBank, ExpertSpec, env, make_pool
from hostcompute.backends.select import BackendChoice
from hostcompute.topology import choose_cores
from monde.config import MondeConfig
from monde.core import Counters, LoadReport, Placement
from monde.executors.decode import DecodeExecutor, DecodeHub
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
        self.pool = host_pool(config, device)
        self._num_replays = 0
        self._hubs: dict[torch.dtype, DecodeHub] = {}
        self._decoders: dict[tuple[int, torch.dtype], DecodeExecutor] = {}
        self.heat_LE = [torch.zeros(spec.num_experts, device=device) for spec in specs]
        self.layers: list[MoELayer] = []
        for spec, num_resident in zip(specs, plan.num_resident_L, strict=True):
            self.layers.append(self._build_layer(spec, num_resident))
        self.why_not_decode = why_not_decode(self.device, self.host_choice)
        if self.device.type == "cuda" and self.why_not_decode:
            warnings.warn(
                f"decode steps wait for the host in Python: {self.why_not_decode}",
                RuntimeWarning,
                stacklevel=3,
            )

    def _build_layer(self, spec: ExpertSpec, num_resident: int) -> MoELayer:
        placement = first_experts(spec.num_experts, num_resident)
        host = HostExecutor(ExpertBank(spec, self.config.cpu_backend, self.pool), self.staging)
        decoder = partial(self._decoder, len(self.layers))
        if num_resident == 0:
            return MoELayer(spec, placement, host, decoder=decoder)
        slots = ExpertSlots(spec, num_resident, self.device)
        return MoELayer(spec, placement, host, GpuExecutor(slots, placement, self.device), decoder)

    # ---- decode ----
    def _decoder(self, layer_idx: int, x_dtype: torch.dtype) -> DecodeExecutor | None:
        """Made at the first step with activations of this type; None where decode cannot run on its own."""
        if self.why_not_decode:
            return None
        if x_dtype not in self._hubs:
            specs, banks = zip(*((layer.spec, layer.host.bank) for layer in self.layers), strict=True)
            self._hubs[x_dtype] = DecodeHub(specs, banks, x_dtype, self.device, self.pool)
        if (layer_idx, x_dtype) not in self._decoders:
            layer = self.layers[layer_idx]
            slots = None if layer.device is None else layer.device.slots
            table_E, heat_E = layer.placement.slot_of_expert_E, self.heat_LE[layer_idx]
            self._decoders[layer_idx, x_dtype] = DecodeExecutor(
                layer_idx, layer.spec, slots, table_E, heat_E, self._hubs[x_dtype]
            )
        return self._decoders[layer_idx, x_dtype]

    def begin_step(self) -> None:
        """Before a step of the model. Errors: RuntimeError for an earlier step that the host did not answer."""
        self.check()

    def before_replay(self) -> None:
        """Before a CUDA graph that holds a step of the model."""
        self._num_replays += 1
        for hub in self._hubs.values():
            hub.before_replay()

    def end_step(self) -> None:
        """After a step was launched; it may still run."""

    def finish(self) -> None:
        """After a whole generation: waits for its latest step. Errors: as check."""
        if self._hubs:
            torch.cuda.current_stream(self.device).synchronize()
            self.check()

    def check(self) -> None:
        """Errors: RuntimeError naming the MoE layer that got no answer from the host. Synchronises only then."""
        for hub in self._hubs.values():
            hub.check()

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
        totals += [hub.totals() for hub in self._hubs.values()]
        num_resident_pairs = sum(layer.device.num_pairs for layer in self.layers if layer.device is not None)
        num_resident_pairs += sum(hub.count("RESIDENT_PAIRS") for hub in self._hubs.values())
        return Counters(
            num_steps=max(layer.num_calls for layer in self.layers) + self._num_replays,
            num_pairs=sum(t.num_pairs for t in totals) + num_resident_pairs,
            num_resident_pairs=num_resident_pairs,
            host_weight_bytes=sum(t.weight_bytes for t in totals),
            h2d_bytes=sum(t.h2d_bytes for t in totals),
            d2h_bytes=sum(t.d2h_bytes for t in totals),
            host_busy_s=sum(t.busy_s for t in totals),
        )

    def reset_counters(self) -> None:
        self._num_replays = 0
        for hub in self._hubs.values():
            hub.reset_totals()
        for layer in self.layers:
            layer.num_calls = 0
            layer.host.totals = HostTotals()
            if layer.device is not None:
                layer.device.num_pairs = 0

    # ---- life ----
    def close(self) -> None:
        """Give the host memory back; the model cannot run afterwards. Closing twice is fine."""
        for hub in self._hubs.values():
            hub.close()
        self._hubs.clear()
        self._decoders.clear()
        for layer in self.layers:
            layer.host.bank.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copied model shares the experts of the original."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model run by monde cannot be pickled; use save_pretrained and load it again")


def host_pool(config: MondeConfig, device: torch.device) -> Any:
    """The host kernels' threads; None for the process's own pool."""
    if config.num_threads is not None:
        return make_pool(config.num_threads)
    return make_pool(host_threads()) if device.type == "cuda" else None


def host_threads() -> int:
    """Threads of the host kernels next to a GPU: one core stays with who launches steps and spins for them."""
    return max(1, len(choose_cores(env.num_threads())) - 1)


def why_not_decode(device: torch.device, host: BackendChoice) -> str:
    """Why GPU and host cannot decode without Python in between; empty if they can."""
    if device.type != "cuda":
        return "the model runs on the CPU"
    if host.name != "native":
        return f"the host computes with {host.name} ({host.why}), only the native backend answers a GPU"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed; pip install monde[cuda13] or monde[cuda12]"
    return ""


def first_experts(num_experts: int, num_resident: int) -> Placement:
    """The first `num_resident` experts have the slots: without heat to go by, any choice is as good."""
    return Placement(tuple(e if e < num_resident else -1 for e in range(num_experts)))
