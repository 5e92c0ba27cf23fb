"""Popular experts on the GPU for good, the others where they are cheaper: Fiddler's way, with torch on the CPU.

Per cold expert, by costs measured at the start: the CPU computes it in place, or its weights are copied and the GPU
does. The GPU's work is launched first, so both sides work at once; dense layers run eagerly.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.contenders.base import Demand, DoesNotFitError, Setting, decoding_of, free_memory, shortened
from bench.contenders.host_experts import (
    HostExperts,
    HostLayer,
    Slots,
    copy_stream,
    expert,
    replaced,
    weight_of,
)
from bench.decode import models
from bench.decode.bound import Traffic
from bench.decode.steps import Decoding, GrowingSteps

NUM_WARM_UPS = 4
_TOKENS = (1, 2, 4, 8, 16, 32)
_NUM_STAGING = 2  # slots for what is copied on demand


class Costs:
    """Seconds of one cold expert, either way."""

    def __init__(self, host: HostExperts) -> None:
        layer, device = host.layers[0], host.device
        num_experts, _, d_model = layer.gate_up_ENK.shape
        turn = iter(range(1 << 30))  # other experts every time, so that no cache holds them

        def on_cpu(x_TD: Tensor) -> None:
            e = next(turn) % num_experts
            expert(x_TD, layer.gate_up_ENK[e], layer.down_EDF[e])

        self._cpu_s = [
            _median_s(lambda t=t: on_cpu(torch.zeros(t, d_model, dtype=layer.down_EDF.dtype)))
            for t in _TOKENS
        ]
        slots = Slots(layer, 1, device, copy_stream(device))
        x_TD = torch.zeros(1, d_model, dtype=layer.down_EDF.dtype, device=device)

        def fetch() -> None:
            slots.fetch(0, next(turn) % num_experts)
            slots.compute(0, x_TD)
            if device.type == "cuda":
                torch.cuda.synchronize()

        self.fetch_s = _median_s(fetch)

    def cpu_s(self, num_tokens: int) -> float:
        return float(np.interp(num_tokens, _TOKENS, self._cpu_s))

    def told(self) -> dict[str, Any]:
        return {"cpu_s": dict(zip(_TOKENS, self._cpu_s, strict=True)), "fetch_s": self.fetch_s}


class PopularExperts(nn.Module):
    """One layer; residents are set by `place`."""

    def __init__(
        self, layer: HostLayer, num_slots: int, device: torch.device, stream: Any, costs: Costs
    ) -> None:
        super().__init__()
        self._layer, self._costs = layer, costs
        self._slots = Slots(layer, num_slots, device, None)
        self._staging = Slots(layer, _NUM_STAGING, device, stream)
        self._slot_of: dict[int, int] = {}
        self._num_fetched = 0
        self.num_resident = self.num_on_cpu = self.num_fetched = self.num_calls_with_cold = 0

    def place(self, p_E: NDArray[np.float64]) -> None:
        chosen = np.argsort(-p_E, kind="stable")[: self._slots.num_slots].tolist()
        self._slot_of = {e: slot for slot, e in enumerate(chosen)}
        for e, slot in self._slot_of.items():
            self._slots.fetch(slot, e)

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        tokens = Counter(expert_id for row in ids_TK.tolist() for expert_id in row)
        cold = {e: t for e, t in sorted(tokens.items()) if e not in self._slot_of}
        on_cpu = [e for e, t in cold.items() if self._costs.cpu_s(t) <= self._costs.fetch_s]
        fetched = [e for e in cold if e not in on_cpu]
        self._count(len(tokens) - len(cold), len(on_cpu), len(fetched))
        x_host_TD, ids_host_TK, weights_host_TK = (
            (t.cpu() for t in (x_TD, ids_TK, weights_TK)) if on_cpu else (x_TD, ids_TK, weights_TK)
        )
        y_TD = torch.zeros_like(x_TD)
        for e in tokens:
            if e in self._slot_of:
                y_TD += weight_of(ids_TK, weights_TK, e) * self._slots.compute(self._slot_of[e], x_TD)
        for e in fetched:
            slot = self._num_fetched % _NUM_STAGING
            self._num_fetched += 1
            self._staging.fetch(slot, e)
            y_TD += weight_of(ids_TK, weights_TK, e) * self._staging.compute(slot, x_TD)
        if on_cpu:
            y_host_TD = torch.zeros_like(x_host_TD)
            for e in on_cpu:
                rows = (ids_host_TK == e).any(1).nonzero()[:, 0]
                weight_T1 = weight_of(ids_host_TK[rows], weights_host_TK[rows], e)
                y_e = expert(x_host_TD[rows], self._layer.gate_up_ENK[e], self._layer.down_EDF[e])
                y_host_TD.index_add_(0, rows, weight_T1 * y_e)
            y_TD += y_host_TD.to(y_TD.device)
        return y_TD

    def _count(self, num_resident: int, num_on_cpu: int, num_fetched: int) -> None:
        self.num_resident += num_resident
        self.num_on_cpu += num_on_cpu
        self.num_fetched += num_fetched
        self.num_calls_with_cold += bool(num_on_cpu or num_fetched)

    def reset(self) -> None:
        self.num_resident = self.num_on_cpu = self.num_fetched = self.num_calls_with_cold = 0


class Popular:
    """The first layers of the model, with the num_slots most popular experts of each on the GPU."""

    group = "hybrid"

    def __init__(
        self, setting: Setting, host: HostExperts, costs: Costs, budget: str, num_slots: int
    ) -> None:
        self.name, self.budget, self.num_layers = (
            "popular static, torch CPU experts",
            budget,
            len(host.layers),
        )
        self.note = f"{num_slots} slots a layer, the number that monde plans; eager"
        if num_slots < 1:
            raise DoesNotFitError("the budget leaves no slot")
        config = shortened(setting.config, self.num_layers)
        self.model: Any = models.build(config, setting.dense, setting.device, models.nothing)
        stream = copy_stream(setting.device)
        self._costs = costs
        self._layers = [
            PopularExperts(layer, num_slots, setting.device, stream, costs) for layer in host.layers
        ]
        replaced(self.model, list(self._layers))

    @torch.no_grad()
    def decoding(self, demand: Demand) -> Decoding:
        for layer, p_E in zip(self._layers, demand.p_LE, strict=False):
            layer.place(p_E)
        decoding = decoding_of(GrowingSteps(self.model, demand.case), self.model, demand.case)
        decoding.run(NUM_WARM_UPS)
        for layer in self._layers:
            layer.reset()
        return decoding

    def traffic(self, demand: Demand, num_steps: int) -> Traffic:
        return Traffic(
            cold_experts=sum(one.num_on_cpu + one.num_fetched for one in self._layers) / num_steps,
            resident_experts=sum(one.num_resident for one in self._layers) / num_steps,
            layers_with_cold=sum(one.num_calls_with_cold for one in self._layers) / num_steps,
        )

    def figures(self, num_steps: int) -> dict[str, Any]:
        totals = {
            name: sum(getattr(layer, name) for layer in self._layers) / num_steps
            for name in ("num_resident", "num_on_cpu", "num_fetched")
        }
        return {f"{name}_per_step": value for name, value in totals.items()} | self._costs.told()

    def close(self) -> None:
        del self.model, self._layers
        free_memory()


def _median_s(call: Callable[[], None], num_calls: int = 12) -> float:
    samples = []
    for _ in range(num_calls):
        start_s = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start_s)
    return statistics.median(samples[2:])
