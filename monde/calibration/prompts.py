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
from torch import Tensor

from hostcompute import ExpertBank, ExpertSpec
from monde.calibration.host import rotating
from monde.calibration.samples import Probe, Samples, Timings, seconds_of
from monde.core import Placement, RoutedBatch
from monde.device.pinned import PinnedRange
from monde.executors.pieces import in_whole, piece_layout
from monde.executors.prefill import PrefillExecutor
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import BLOCK_ROWS, PrefillSize
from monde.executors.products import Packed, Products, Rows
from monde.executors.waves import Ints, Order, Wave, tiles_of
from monde.planning.machines import DESCRIBED
from monde.planning.profile import PromptLaunches
from monde.planning.split_policies import SplitPolicy, all_fetch, all_host
from monde.weights.host import HostBlobs
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable

PROMPT_TOKENS, _ACTIVE = 32, 8  # enough for the host and the bus to take longer than Python
_NUM_SAMPLES, _NUM_WARM_UPS = 40, 5
_QUICK = 0.25
_WAYS: dict[str, tuple[bool, SplitPolicy]] = {
    "resident": (True, all_host),
    "on the host": (False, all_host),
    "fetched": (False, all_fetch),
}


class ResidentProducts:
    """The products of experts in `slots`, as PrefillExecutor launches them for residents."""

    def __init__(self, spec: ExpertSpec, slots: ExpertSlots, hub: PrefillHub, piece_rows: int) -> None:
        self.spec, self.slots, self.hub, self.piece_rows = spec, slots, hub, piece_rows
        kernels = hub.kernels(torch.bfloat16, spec)
        self._products = Products(spec, torch.bfloat16, hub.scratch_B, kernels, BLOCK_ROWS)

    def order(self, num_tokens: int, experts: Ints) -> Order:
        """`num_tokens` rows of each of these experts, one after the other."""
        tokens_E = np.zeros(self.spec.num_experts, np.int64)
        tokens_E[experts] = num_tokens
        return Order.of(experts, tokens_E)

    def launches(self, num_tokens: int, experts: Ints, rows: Rows | None = None) -> Callable[[], None]:
        """What computes `num_tokens` rows of each of these experts, of `rows` or of random ones."""
        spec, device = self.spec, self.hub.lanes.device
        order = self.order(num_tokens, experts)
        waves = [
            Wave.of(
                experts,
                (row, min(self.piece_rows, spec.d_ffn - row)),
                in_whole(spec, row),
                experts * self.slots.blobs_SB.stride(0),
                experts,
                order,
            )
            for row in range(0, spec.d_ffn, self.piece_rows)
        ]
        tiles_n4, num_tiles = tiles_of(waves)
        tiles = torch.from_numpy(tiles_n4).to(device).split(num_tiles)
        chosen = rows or self.rows(num_tokens, order)
        packed = Packed(self.slots.blobs_SB, self.slots.biases)

        def launch() -> None:
            for wave, wave_tiles_n4 in zip(waves, tiles, strict=True):
                self._products.multiply(wave, wave_tiles_n4, packed, chosen, lambda: None)

        return launch

    def rows(self, num_tokens: int, order: Order) -> Rows:
        device, D, N = self.hub.lanes.device, self.spec.d_model, order.num_rows
        x_TD = torch.randn(num_tokens, D, device=device).bfloat16()
        tokens_N = torch.arange(N, device=device) % num_tokens
        v_ND = torch.zeros(N + 1, D, dtype=torch.bfloat16, device=device)
        h_NF: Tensor | None = None
        if self._products.panels is not None:
            f_pad_k = piece_layout(self.spec, min(self.piece_rows, self.spec.d_ffn)).f_pad_k
            h_NF = torch.empty(N, f_pad_k, dtype=torch.bfloat16, device=device)
        return Rows(x_TD, tokens_N, tokens_N, v_ND, h_NF)


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
            is_resident: PrefillExecutor(
                int(is_resident),
                bank,
                slots if is_resident else None,
                SlotTable(Placement(everyone if is_resident else nobody), device),
                self.hub,
                lambda: blobs,
            )
            for is_resident in (False, True)
        }

    def probes(self) -> list[Probe]:
        return [Probe(_name(way), partial(self._timed, way)) for way in _WAYS]

    def _timed(self, way: str) -> Timings:
        is_resident, self.hub.policy = _WAYS[way]
        layer, spec, A = self.layers[is_resident], self.bank.spec, self.num_active
        weights_TA = torch.full((PROMPT_TOKENS, A), 1 / A, device=self.device)
        x_TD = torch.randn(PROMPT_TOKENS, spec.d_model, device=self.device).bfloat16()
        routings = [ids_TA.to(self.device) for ids_TA in rotating(spec.num_experts, A, PROMPT_TOKENS)]

        def step(i: int) -> None:
            layer.forward(RoutedBatch(x_TD, routings[i % len(routings)], weights_TA))
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()

        samples = [seconds_of(partial(step, i)) for i in range(_NUM_WARM_UPS + _NUM_SAMPLES)]
        return {_name(way): samples[_NUM_WARM_UPS:]}

    def launches(self, samples: Mapping[str, Samples], host_expert_s: float, copy_s: float) -> PromptLaunches:
        """Of the quicker quarter of the calls, what neither products nor these seconds of an expert explain.

        Once the probes have run: the part before anything starts is told by the layer's own clock.
        """
        seconds = {way: float(np.quantile(samples[_name(way)].all_s, _QUICK)) for way in _WAYS}
        phases, resident_s = self.layers[True].phases, seconds["resident"]
        before_s = phases.count_s + phases.count_wait_s + phases.plan_s
        in_all_s = before_s + phases.launch_s + phases.host_wait_s + phases.combine_s
        plan_s = resident_s * before_s / in_all_s
        return PromptLaunches(
            plan_s=plan_s,
            layer_s=resident_s - plan_s,
            host_s=max(0.0, seconds["on the host"] - plan_s - self.num_active * host_expert_s),
            fetch_s=max(0.0, seconds["fetched"] - plan_s - self.num_active * copy_s),
        )

    def close(self) -> None:
        self.hub.close()
        if self._pinned is not None:
            self._pinned.close()


def _name(way: str) -> str:
    return f"prompt's layer, {way}"
