"""Everything monde holds for one model: its layers, host banks, device slots, budget and counters."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from hostcompute import ExpertBank, ExpertSpec
from hostcompute.backends.select import BackendChoice
from hostcompute.topology import ALL_CORES
from monde.config import MOVING, MondeConfig
from monde.core import Counters, LoadReport, Placement
from monde.executors.decode import MAX_DECODE_TOPK, DecodeExecutor, DecodeHub, why_not_decode
from monde.executors.deferral import DeferredSteps
from monde.executors.host import HostExecutor, HostTotals, host_pool
from monde.executors.prefill import PrefillExecutor
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import PrefillSize
from monde.executors.ranked_model import RankedModel
from monde.executors.zero_copy import first_share
from monde.layer import DeferringLayer, Front, MoELayer, RankedLayer
from monde.planning.budget import MemoryPlan
from monde.planning.placement import best_experts
from monde.planning.split_policies import FETCH_AHEAD, SPLIT_POLICIES
from monde.profile_store import profile_of, this_machine
from monde.residency import POLICIES, Residency
from monde.routing.heat import Heat
from monde.routing.trace import TraceRecorder
from monde.weights.host import from_host_arrays
from monde.weights.places import place_pools
from monde.weights.staging import Staging


class Engine:
    """Owner of the experts of one model; `model.monde`.

    Built empty from the layers' specs and a plan that fits; experts arrive one by one, by `load_expert`.
    Over ranks `specs` and `layers` are this rank's parts of the model's layers, as `ranked` cuts them. What modules
    call are the `fronts`, one a layer of the model.
    """

    load_report: LoadReport

    def __init__(
        self,
        config: MondeConfig,
        specs: Sequence[ExpertSpec],
        plan: MemoryPlan,
        device: torch.device,
        ranked: RankedModel | None = None,
    ) -> None:
        self.config, self.plan, self.device = config, plan, device
        self.staging = Staging(pinned=device.type == "cuda")
        self.ranked = ranked
        self.pool = host_pool(config.num_threads, device, ALL_CORES if ranked is None else ranked.ranks.cores)
        self._num_replays = 0
        # Layers share scratch, staging and residents; banks alone take calls of several threads at once.
        self._turn = threading.RLock()
        self._hubs: dict[torch.dtype, DecodeHub] = {}
        self._decoders: dict[tuple[int, torch.dtype], DecodeExecutor] = {}
        placements, heat = placements_of(config, plan)
        pools = place_pools(specs, plan.num_cold_of_released, plan.num_spare_places)
        banks = [
            ExpertBank(spec, config.cpu_backend, self.pool, places=pools[l].memory if l in pools else None)
            for l, spec in enumerate(specs)
        ]
        policy = POLICIES.get(config.residency, POLICIES["dynamic"])
        self.prefill = self._prefill_hub(specs)
        self.residency = Residency(
            banks,
            placements,
            plan.size.layers,
            device,
            plan.moves,
            policy,
            heat,
            pools,
            exchanging=self._forget_fetches,
        )
        self.layers = [self._build_layer(layer_idx, bank) for layer_idx, bank in enumerate(banks)]
        self.fronts: Sequence[Front] = self.layers
        self.deferred: DeferredSteps | None = None
        if config.deferred_experts:
            self.deferred = DeferredSteps(config.deferred_experts, len(banks))
            self.fronts = [DeferringLayer(layer, self.deferred) for layer in self.layers]
        if ranked is not None:
            self.fronts = [self._build_front(ranked, layer_idx) for layer_idx in range(len(ranked.whole))]
        self.why_not_decode = why_not_decode(self.device, self.host_choice)
        if self.device.type == "cuda" and self.why_not_decode:
            self._warn(f"decode steps wait for the host in Python: {self.why_not_decode}")
        if config.residency in MOVING and plan.wants_moves and plan.short_for_moves_bytes:
            self._warn(f"residency is {plan.why_static}")

    def _build_layer(self, layer_idx: int, bank: ExpertBank) -> MoELayer:
        table, slots = self.residency.tables[layer_idx], self.residency.slots[layer_idx]
        host, decoder = HostExecutor(bank, self.staging), partial(self._decoder, layer_idx)
        device = None
        if self.prefill is not None:
            blobs = partial(self.residency.fetchable, layer_idx)
            device = PrefillExecutor(layer_idx, bank, slots, table, self.prefill, blobs)
        alone = device is not None or self.device.type == "cuda"
        turn = self._turn if alone else contextlib.nullcontext()
        return MoELayer(bank.spec, table, host, device, decoder, layer_idx, self.residency, turn)

    def _build_front(self, ranked: RankedModel, layer_idx: int) -> RankedLayer:
        parts = [self.layers[held.part_idx] for held in ranked.held_LP[layer_idx]]
        return RankedLayer(parts, ranked.executor(layer_idx, [part.compute for part in parts]))

    def _forget_fetches(self) -> None:
        if self.prefill is not None:
            self.prefill.forget()

    def _prefill_hub(self, specs: Sequence[ExpertSpec]) -> PrefillHub | None:
        """None where all experts are on the host and the host is all there is."""
        if self.device.type != "cuda" and not any(self.plan.num_resident_L):
            for setting in self.config.slot_settings():
                self._warn(
                    f"{setting} changes nothing: all experts are on the host; give a GPU, or a gpu_memory that holds some"
                )
            return None
        machine = this_machine()
        profile = profile_of(machine)
        if self.device.type == "cuda" and profile.machine != machine:
            self._warn(
                f"prompts are planned with the figures of {profile.machine.name} ({profile.source}) until they have "
                "been timed; run `monde calibrate` to measure this machine"
            )
        num_tokens = self.plan.size.num_tokens * (1 if self.ranked is None else self.ranked.ranks.size)
        size = PrefillSize.of(specs, torch.float32.itemsize, num_tokens, MAX_DECODE_TOPK)
        hub = PrefillHub(self.device, size, profile, SPLIT_POLICIES[self.config.split_policy])
        hub.fetches_ahead = self.config.split_policy in FETCH_AHEAD
        return hub

    @staticmethod
    def _warn(what: str) -> None:
        warnings.warn(what, RuntimeWarning, stacklevel=4)

    # ---- decode ----
    def _decoder(self, layer_idx: int, x_dtype: torch.dtype) -> DecodeExecutor | None:
        """Made at the first step with activations of this type; None where decode cannot run on its own."""
        if self.why_not_decode:
            return None
        if x_dtype not in self._hubs:
            specs, banks = zip(*((layer.spec, layer.host.bank) for layer in self.layers), strict=True)
            share = first_share(profile_of(this_machine()))
            self._hubs[x_dtype] = DecodeHub(specs, banks, x_dtype, self.device, self.pool, share=share)
        if (layer_idx, x_dtype) not in self._decoders:
            layer = self.layers[layer_idx]
            slots, heat_E = self.residency.slots[layer_idx], self.residency.tracker.count_E(layer_idx)
            self._decoders[layer_idx, x_dtype] = DecodeExecutor(
                layer_idx,
                layer.spec,
                slots,
                layer.table,
                heat_E,
                self._hubs[x_dtype],
                self.residency.fetchable(layer_idx),
            )
        return self._decoders[layer_idx, x_dtype]

    def begin_step(self) -> None:
        """Before a step of the model, which may be a graph: those outlive the memory that they read.

        Errors: RuntimeError after close, and for an earlier step that the host did not answer.
        """
        self.layers[0].check_open()
        for hub in self._hubs.values():
            hub.begin_step()

    def before_replay(self) -> None:
        """Before a CUDA graph that holds a step of the model."""
        with self._turn:
            self._num_replays += 1
            self.residency.step()
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
        """Copy one expert to where the placement wants it. `arrays` are the keywords of ExpertBank.load.

        Over ranks `arrays` is the whole expert, of which a rank takes what it holds, and whatever it likes if nothing.
        """
        if self.ranked is None:
            self._load(layer_idx, expert_id, arrays)
            return
        self.ranked.note(arrays)
        for part_idx, local_id, part in self.ranked.parts_of(layer_idx, expert_id, arrays):
            self._load(part_idx, local_id, part)

    def settle(self) -> None:
        """Before weights of a model that has run change: nothing that reads them is under way. Waits for the device."""
        with self._turn:
            self.layers[0].check_open()
            self.residency.settle()

    def holds(self, layer_idx: int, expert_id: int) -> bool:
        """Whether this process needs the expert's weights."""
        return self.ranked is None or self.ranked.holds(layer_idx, expert_id)

    def loaded(self) -> None:
        """All experts have arrived. Over ranks, measures what they take there; all ranks call it."""
        if self.ranked is not None:
            for layer_idx, held_P in enumerate(self.ranked.held_LP):
                part = self.layers[held_P[0].part_idx]
                self.ranked.measure(layer_idx, part.compute_unwatched, self.device)
            self.reset_counters()

    def _load(self, layer_idx: int, expert_id: int, arrays: Mapping[str, Tensor]) -> None:
        layer = self.layers[layer_idx]
        slot = layer.table.placement.slot_of_expert_E[expert_id]
        self._forget_fetches()
        slots = self.residency.slots[layer_idx]
        if slot >= 0 and slots is not None:
            slots.write(slot, arrays)
        if slot < 0 or self.residency.moves(layer_idx):
            layer.host.bank.load(expert_id, **arrays)
            self.residency.loaded(layer_idx)

    def export_expert(self, layer_idx: int, expert_id: int) -> dict[str, Tensor]:
        """One expert as `load_expert` took it, bit for bit, on the CPU. Over ranks all of them call it."""
        self.layers[0].check_open()
        if self.ranked is None:
            return self._export(layer_idx, expert_id)
        held = self.ranked.held_LP[layer_idx][0]
        local_id = held.part.local_id(expert_id)
        mine = {} if local_id is None else self._export(held.part_idx, local_id)
        return self.ranked.join(layer_idx, mine)

    def _export(self, layer_idx: int, expert_id: int) -> dict[str, Tensor]:
        layer, slots = self.layers[layer_idx], self.residency.slots[layer_idx]
        with self._turn:
            slot = layer.table.placement.slot_of_expert_E[expert_id]
            if slot >= 0 and slots is not None and expert_id not in layer.host.bank.loaded_experts:
                return {role: tensor.cpu() for role, tensor in slots.read(slot).items()}
            return from_host_arrays(layer.host.bank.export(expert_id))

    def watch_heat(self) -> None:
        """Count from now on which experts are asked for, also where all are on the host and nobody else needs to know."""
        self._one_process("watch_heat")
        self.residency.counts = True

    def save_heat(self, path: str | Path) -> None:
        """How hot every expert is by now, as a heat file for MondeConfig(heat_file=...). Synchronises.

        Errors: ValueError for a model without slots that runs on the CPU, unless watch_heat was called.
        """
        self.residency.heat().save(path)

    @contextlib.contextmanager
    def record_routing(self) -> Iterator[TraceRecorder]:
        """What routers ask for inside, step by step; `finish()` of what this gives is a Trace for `monde plan --routing`.

        Decode steps are launched one by one meanwhile, for no graph writes down what it routes.
        Errors: RuntimeError while another record is made, ValueError over ranks.
        """
        self._one_process("record_routing")
        if self.residency.recorder is not None:
            raise RuntimeError("record_routing: another record is being made; end that one first")
        recorder = TraceRecorder([layer.spec.num_experts for layer in self.layers])
        self.residency.recorder = recorder
        try:
            yield recorder
        finally:
            self.residency.recorder = None

    @property
    def is_recording(self) -> bool:
        return self.residency.recorder is not None

    def _one_process(self, what: str) -> None:
        if self.ranked is not None:
            raise ValueError(
                f"{what}: the experts of this model are spread over ranks; load it in one process"
            )

    # ---- what happened ----
    @property
    def host_choice(self) -> BackendChoice:
        """Which host backend and ISA run, and why."""
        return self.layers[0].host.bank.choice

    def counters(self) -> Counters:
        """Sums since the last reset."""
        totals = [layer.host.totals for layer in self.layers]
        totals += [hub.totals() for hub in self._hubs.values()]
        prefills = [layer.device for layer in self.layers if layer.device is not None]
        totals += [prefill.totals for prefill in prefills]
        num_resident_pairs = sum(prefill.num_resident_pairs for prefill in prefills)
        num_fetched_pairs = sum(prefill.num_fetched_pairs for prefill in prefills)
        num_resident_pairs += sum(hub.count("RESIDENT_PAIRS") for hub in self._hubs.values())
        return Counters(
            num_steps=max(layer.num_calls for layer in self.layers) + self._num_replays,
            num_pairs=sum(t.num_pairs for t in totals) + num_resident_pairs + num_fetched_pairs,
            num_resident_pairs=num_resident_pairs,
            num_fetched_pairs=num_fetched_pairs,
            host_weight_bytes=sum(t.weight_bytes for t in totals),
            h2d_bytes=sum(t.h2d_bytes for t in totals),
            d2h_bytes=sum(t.d2h_bytes for t in totals) + self.residency.returned_bytes,
            host_busy_s=sum(t.busy_s for t in totals),
            num_swaps=self.residency.num_swaps,
            swap_bytes=self.residency.swap_bytes,
        )

    def reset_counters(self) -> None:
        self._num_replays = self.residency.num_swaps = self.residency.swap_bytes = 0
        self.residency.returned_bytes = 0
        for hub in self._hubs.values():
            hub.reset_totals()
        for layer in self.layers:
            layer.num_calls = 0
            layer.host.totals = HostTotals()
            if layer.device is not None:
                layer.device.reset_totals()

    # ---- life ----
    def close(self) -> None:
        """Give the host memory back; the model cannot run afterwards. Closing twice is fine."""
        for hub in self._hubs.values():
            hub.close()
        self._hubs.clear()
        self._decoders.clear()
        if self.prefill is not None:
            self.prefill.close()
        self.residency.close()
        for layer in self.layers:
            layer.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """A copied model shares the experts of the original."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model run by monde cannot be pickled; use save_pretrained and load it again")


def placements_of(config: MondeConfig, plan: MemoryPlan) -> tuple[Sequence[Placement], Heat | None]:
    """Who has a slot at first: the hottest experts of the heat file, else the first of every layer.

    Errors: ValueError for a file that holds no heat or that of another model, OSError when it is absent.
    """
    num_experts_L = [layer.num_experts for layer in plan.size.layers]
    if config.heat_file is None:
        return best_experts(
            [np.zeros(num_experts) for num_experts in num_experts_L], plan.num_resident_L
        ), None
    heat = Heat.load(config.heat_file)
    heat.check("this model", num_experts_L)
    return best_experts(heat.count_L, plan.num_resident_L), heat
