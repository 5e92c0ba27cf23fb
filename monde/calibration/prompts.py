"""Layers of long prompts: their residents' products alone, and what Python takes around them.

The products are timed in a graph, where launching them costs nothing. Whole layers on the host and over the bus tell
what holds these sides up besides their experts.
Letters: T tokens, A active experts of one call, E experts, D model dim, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from hostcompute import ExpertBank
from monde.calibration.host import rotating
from monde.calibration.samples import Probe, Samples, Timings, seconds_of
from monde.core import Placement, RoutedBatch
from monde.device.pinned import PinnedRange
from monde.executors.device_part import DevicePart
from monde.executors.prefill import PrefillExecutor
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import PrefillSize
from monde.executors.products import Rows
from monde.executors.waves import Ints, Order
from monde.planning.machines import DESCRIBED
from monde.planning.prefill_schedule import Residents
from monde.planning.profile import PromptLaunches
from monde.planning.schedule import Resource, Task
from monde.planning.split_policies import SplitPolicy, all_fetch, all_host
from monde.weights.host import HostBlobs
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable

PROMPT_TOKENS, _ACTIVE = 32, 8  # enough for the host and the bus to take longer than Python
_NUM_SAMPLES, _NUM_WARM_UPS = 40, 5
_NUM_IN_ROW = 5  # layers that wait for nothing: one after the other they take what launching them takes
_QUICK = 0.25
_NO_PLAN = "resident, nothing planned"
_WAYS: dict[str, tuple[bool, SplitPolicy]] = {
    "resident": (True, all_host),
    _NO_PLAN: (True, all_host),
    "on the host": (False, all_host),
    "fetched": (False, all_fetch),
}


def resident_products(part: DevicePart, num_tokens: int, experts: Ints) -> tuple[Callable[[], None], Rows]:
    """What launches the products of `num_tokens` rows of each of these residents, by slot; and the rows.

    Every expert of the layer has the slot of its own number.
    """
    spec, device = part.spec, part.hub.lanes.device
    tokens_E = np.zeros(spec.num_experts, np.int64)
    tokens_E[experts] = num_tokens
    x_TD = torch.randn(num_tokens, spec.d_model, device=device).bfloat16()
    ids_TA = torch.from_numpy(experts).repeat(num_tokens, 1).to(device)
    tasks = [Task("residents", Resource.GPU, 0.0, payload=Residents(experts))]
    placed = part.place(
        tasks, Order.of(experts, tokens_E), np.arange(spec.num_experts), x_TD, ids_TA, torch.bfloat16
    )
    return partial(part.multiply_residents, placed, 0), placed.rows


class PromptLayers:
    """Layers of A of a bank's experts, resident, on the host and fetched: whole calls, Python and all."""

    def __init__(self, bank: ExpertBank, slots: ExpertSlots, device: torch.device) -> None:
        spec, blobs = bank.spec, HostBlobs(bank)
        self.bank, self.device = bank, device
        self.num_active = min(_ACTIVE, spec.num_experts)
        self._pinned = (
            PinnedRange(*blobs.range_of(0, spec.num_experts), blobs, device)
            if device.type == "cuda"
            else None
        )
        size = PrefillSize.of([spec], torch.bfloat16.itemsize, PROMPT_TOKENS, self.num_active)
        self.hub = PrefillHub(device, size, DESCRIBED["h200"], learns=False)
        self.hub.fetches_ahead = False
        everyone, nobody = tuple(range(spec.num_experts)), (-1,) * spec.num_experts
        self.layers = {
            way: PrefillExecutor(
                layer_idx,
                bank,
                slots if is_resident else None,
                SlotTable(Placement(everyone if is_resident else nobody), device),
                self.hub,
                lambda: blobs,
            )
            for layer_idx, (way, (is_resident, _)) in enumerate(_WAYS.items())
        }

    def probes(self) -> list[Probe]:
        return [Probe(_name(way), partial(self._timed, way)) for way in _WAYS]

    def _timed(self, way: str) -> Timings:
        _, self.hub.policy = _WAYS[way]
        self.hub.reads_counts = way != _NO_PLAN
        layer, spec, A = self.layers[way], self.bank.spec, self.num_active
        weights_TA = torch.full((PROMPT_TOKENS, A), 1 / A, device=self.device)
        x_TD = torch.randn(PROMPT_TOKENS, spec.d_model, device=self.device).bfloat16()
        routings = [ids_TA.to(self.device) for ids_TA in rotating(spec.num_experts, A, PROMPT_TOKENS)]

        num_in_row = _NUM_IN_ROW if way == _NO_PLAN else 1

        def step(i: int) -> None:
            for j in range(i, i + num_in_row):
                layer.forward(RoutedBatch(x_TD, routings[j % len(routings)], weights_TA))
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()

        for i in range(_NUM_WARM_UPS):
            step(i)
        layer.reset_totals()  # its clock has counted the compiling of kernels, too
        num_samples = _NUM_SAMPLES // num_in_row
        return {_name(way): [seconds_of(partial(step, i)) / num_in_row for i in range(num_samples)]}

    def launches(self, samples: Mapping[str, Samples], host_s: float, copies_s: float) -> PromptLaunches:
        """Of the quicker quarter of the calls, what their experts do not explain: host_s and copies_s of num_active.

        host_s holds the round trip. Once the probes have run: the part before anything starts is told by the layer's
        own clock.
        """
        seconds = {way: float(np.quantile(samples[_name(way)].all_s, _QUICK)) for way in _WAYS}
        phases, resident_s = self.layers["resident"].phases, seconds["resident"]
        before_s = phases.count_s + phases.count_wait_s + phases.plan_s
        in_all_s = before_s + phases.launch_s + phases.host_wait_s + phases.combine_s
        plan_s = resident_s * before_s / in_all_s
        return PromptLaunches(
            plan_s=plan_s,
            layer_s=resident_s - plan_s,
            host_s=max(0.0, seconds["on the host"] - plan_s - host_s),
            fetch_s=max(0.0, seconds["fetched"] - plan_s - copies_s),
            resident_s=seconds[_NO_PLAN],
        )

    def close(self) -> None:
        self.hub.close()
        if self._pinned is not None:
            self._pinned.close()


def _name(way: str) -> str:
    return f"prompt's layer, {way}"
