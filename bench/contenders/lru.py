"""Fetch on demand with a cache of the least recently used, as mixtral-offloading and MoE-Infinity do.

Pinned host memory, one copy stream, a cache per layer. A layer asks which experts are wanted (the host must know, so
it waits for the router), starts the copies of those that miss, computes the hits meanwhile, then each miss as it
arrives. Dense layers run eagerly, as theirs do. No prefetching by guesses about the next layer.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from bench.contenders.base import Demand, DoesNotFitError, Setting, decoding_of, free_memory, shortened
from bench.contenders.host_experts import HostExperts, HostLayer, Slots, copy_stream, replaced, weight_of
from bench.decode import models
from bench.decode.bound import Traffic
from bench.decode.steps import Decoding, GrowingSteps

NUM_WARM_UPS = 12  # after which a cache of any size that is of interest here has been filled
FEW_TOKENS = (
    32  # up to here an expert computes all tokens: its weights are what costs, and nothing is gathered
)
MIN_SLOTS = 2  # one computes while the other one is filled


@dataclass(frozen=True)
class Pairs:
    """Which experts a batch wants, known to the host, which waits for that; of many tokens also whose pairs are whose."""

    experts: list[int]
    order_R: Tensor | None = None
    begin_E: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, ids_TK: Tensor, num_experts: int, few: bool) -> Pairs:
        if few:
            return cls(sorted({expert_id for row in ids_TK.tolist() for expert_id in row}))
        counts = torch.bincount(ids_TK.flatten(), minlength=num_experts).tolist()
        wanted = [e for e, count in enumerate(counts) if count]
        return cls(wanted, ids_TK.flatten().argsort(stable=True), [0, *accumulate(counts)])

    def of_expert(self, e: int) -> Tensor:
        assert self.order_R is not None
        return self.order_R[self.begin_E[e] : self.begin_E[e + 1]]


class LruExperts(nn.Module):
    """One layer. num_hits and num_misses count experts, not pairs."""

    def __init__(self, layer: HostLayer, num_slots: int, device: torch.device, stream: Any) -> None:
        super().__init__()
        self._num_experts = len(layer.gate_up_ENK)
        self._slots = Slots(layer, num_slots, device, stream)
        self._free = list(range(num_slots))
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # the least recently used first
        self.num_hits = self.num_misses = self.num_calls_with_misses = 0

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        few = len(ids_TK) <= FEW_TOKENS
        pairs = Pairs.of(ids_TK, self._num_experts, few)
        wanted = pairs.experts
        hits = [e for e in wanted if e in self._slot_of]
        misses = [e for e in wanted if e not in self._slot_of]
        self.num_hits, self.num_misses = self.num_hits + len(hits), self.num_misses + len(misses)
        self.num_calls_with_misses += bool(misses)
        for e in hits:
            self._slot_of.move_to_end(e)
        # As many copies as can start without evicting a hit of this step or a miss that waits to be computed.
        num_early = min(len(misses), max(0, self._slots.num_slots - len(hits)))
        for e in misses[:num_early]:
            self._fetch(e)
        y_TD = torch.zeros_like(x_TD)
        for i, e in enumerate((*hits, *misses)):
            if i >= len(hits) + num_early:
                self._fetch(e)
            if few:
                y_TD += weight_of(ids_TK, weights_TK, e) * self._slots.compute(self._slot_of[e], x_TD)
            else:
                pairs_R = pairs.of_expert(e)
                tokens_R, weights_R = pairs_R // ids_TK.shape[1], weights_TK.flatten()[pairs_R]
                v_RD = self._slots.compute(self._slot_of[e], x_TD[tokens_R])
                y_TD.index_add_(0, tokens_R, weights_R[:, None] * v_RD)
        return y_TD

    def _fetch(self, expert_id: int) -> None:
        slot = self._free.pop() if self._free else self._slot_of.popitem(last=False)[1]
        self._slot_of[expert_id] = slot
        self._slots.fetch(slot, expert_id)


class Lru:
    """The first layers of the model, with num_slots cached experts each."""

    group = "lru"

    def __init__(self, setting: Setting, host: HostExperts, budget: str, num_slots: int) -> None:
        self.name, self.budget, self.num_layers = "fetch on demand, LRU", budget, len(host.layers)
        self.note = f"{num_slots} slots a layer, the number that monde plans; eager"
        if num_slots < MIN_SLOTS:
            raise DoesNotFitError(f"the budget leaves {num_slots} slots a layer; it takes {MIN_SLOTS}")
        config = shortened(setting.config, self.num_layers)
        self.model: Any = models.build(config, setting.dense, setting.device, models.nothing)
        stream = copy_stream(setting.device)
        self._layers = [LruExperts(layer, num_slots, setting.device, stream) for layer in host.layers]
        replaced(self.model, list(self._layers))

    @torch.no_grad()
    def decoding(self, demand: Demand) -> Decoding:
        decoding = decoding_of(GrowingSteps(self.model, demand.case), self.model, demand.case)
        decoding.run(NUM_WARM_UPS)
        for layer in self._layers:
            layer.num_hits = layer.num_misses = layer.num_calls_with_misses = 0
        return decoding

    def traffic(self, demand: Demand, num_steps: int) -> Traffic:
        return Traffic(
            cold_experts=sum(layer.num_misses for layer in self._layers) / num_steps,
            resident_experts=sum(layer.num_hits for layer in self._layers) / num_steps,
            layers_with_cold=sum(layer.num_calls_with_misses for layer in self._layers) / num_steps,
        )

    def figures(self, num_steps: int) -> dict[str, Any]:
        traffic = self.traffic(None, num_steps)  # type: ignore[arg-type]
        return {
            "expert_hit_rate": traffic.resident_experts / (traffic.resident_experts + traffic.cold_experts)
        }

    def close(self) -> None:
        del self.model, self._layers
        free_memory()
