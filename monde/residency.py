"""Which experts of a model have slots, and how that follows the routing: the hot/cold tracker.

Every few steps of the model: read the heat back without waiting, plan swaps over all layers, move the experts.
L layers, E experts of a layer, N sum of E over layers, T tokens, K experts per token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hostcompute import ExpertBank
from monde.core import Placement, RoutedBatch
from monde.device.copies import Arrival, copies_of
from monde.device.pinned import PinnedRange
from monde.executors.exchange import ExchangeMover
from monde.executors.mover import SlotMover
from monde.planning.budget import MAX_SPARE_PLACES, LayerSize
from monde.planning.placement import swap_limit
from monde.routing.heat import Heat, HeatTracker
from monde.routing.replay import DynamicSettings
from monde.routing.trace import TraceRecorder
from monde.weights.host import HostBlobs, runs
from monde.weights.places import PlacePool, PlaceTable
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable


@dataclass(frozen=True)
class SwapPolicy:
    """When residents change. swap_share: of what the host reads for its experts, what swaps may read."""

    settings: DynamicSettings
    swap_share: float


POLICIES = {
    # A swap reads an expert from host memory once, as the host does each time it computes it: at this share swaps cost
    # decode at most as much of its bandwidth. A prompt is one step of many tokens: right after it the estimate of what
    # the host reads is far too high, hence a limit as well.
    "dynamic": SwapPolicy(DynamicSettings(max_swaps=MAX_SPARE_PLACES), swap_share=1 / 50),
    # Least recently used: a step weighs 256 times the one before, so that the last use decides. As many swaps as it
    # takes, as soon as those before are done.
    "lru": SwapPolicy(
        DynamicSettings(
            half_life_steps=1 / 8,
            interval_steps=1,
            max_swaps=1 << 20,
            hysteresis=0,
            sees_chance=False,
            min_gain=0,
        ),
        1e9,
    ),
}


class Residency:
    """Tables, slots and heat of all layers. One step of the model runs at a time, as everywhere in monde.

    moves: whether residents may change; then the banks, native ones, hold every expert of layers with some slots, but
    in layers of `pools` those without a slot alone. exchanging() is called before such experts change places.
    """

    @torch.inference_mode(
        False
    )  # whatever mode the model is loaded in: steps in any mode change these tensors
    def __init__(
        self,
        banks: Sequence[ExpertBank],
        placements: Sequence[Placement],
        layers: Sequence[LayerSize],
        device: torch.device,
        moves: bool,
        policy: SwapPolicy,
        heat: Heat | None = None,
        pools: Mapping[int, PlacePool] | None = None,
        exchanging: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self.swap_share = policy.settings, policy.swap_share
        self.device, self._layers, self._banks = device, layers, banks
        self.tables = [SlotTable(placement, device) for placement in placements]
        self.slots = [
            ExpertSlots(bank.spec, p.num_resident, device) if p.num_resident else None
            for bank, p in zip(banks, placements, strict=True)
        ]
        # On a GPU the decode kernels count in any case; without slots nobody would use the counts.
        self.counts = device.type == "cuda" or any(slots is not None for slots in self.slots)
        self.tracker = HeatTracker(
            [bank.spec.num_experts for bank in banks], self.settings.half_life_steps, device
        )
        if heat is not None:
            self.tracker.load(heat)
        self.tracker.step(self.settings.interval_steps)
        self._steps_in_round, self._last_layer = 0, len(banks)
        self.num_swaps = self.swap_bytes = self.returned_bytes = 0
        self.recorder: TraceRecorder | None = None  # of what is routed, while somebody wants it
        self._movable = {
            l: slots
            for l, slots in enumerate(self.slots)
            if moves and slots is not None and slots.num_slots < banks[l].spec.num_experts
        }
        self._exchanging = exchanging
        self._places = {l: PlaceTable(banks[l], p, placements[l], device) for l, p in (pools or {}).items()}
        self._blobs = {l: self._blobs_of(l) for l in self._fetched_layers(placements)}
        self._copies = copies_of(device)
        self._mover: SlotMover | ExchangeMover = SlotMover(
            self.tables, self._movable, self._blobs, self._copies
        )
        if self._places:
            self._mover = ExchangeMover(self._mover, self._movable, self._places, self._blobs, self._copies)
        self._read_N2 = self._copies.host_like(self.tracker.state_N2) if self._movable else None
        self._reading: Arrival | None = None
        self._pinned: dict[int, list[PinnedRange]] = {}
        self._why_not_pinned = ""

    # ---- while the model runs ----
    def enter(self, layer_idx: int) -> None:
        """A layer is called, not as part of a replay. A step of the model begins where layers do not go up."""
        begins, self._last_layer = layer_idx <= self._last_layer, layer_idx
        if begins and self.recorder is not None:
            self.recorder.step()
        if begins and not (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self.step()

    def routed(self, layer_idx: int, batch: RoutedBatch) -> None:
        """All pairs of a layer, whoever computes and counts them."""
        if self.recorder is not None:
            self.recorder.record(layer_idx, batch.topk_ids_TK, batch.topk_weights_TK)

    def count(self, layer_idx: int, batch: RoutedBatch) -> None:
        """Pairs that the decode kernels have not counted. No synchronisation."""
        if self.counts:
            self.tracker.update(layer_idx, batch.topk_ids_TK, batch.topk_weights_TK)

    def step(self) -> None:
        """Between two steps of the model. Launches copies at most, and waits for nothing."""
        if not self.counts:
            return
        self._finish_swaps()
        if self._steps_in_round >= self.settings.interval_steps:
            if self._read_N2 is not None and self._reading is None:
                self._reading = self._copies.to_host(self._read_N2, self.tracker.state_N2)
            self.tracker.step(self.settings.interval_steps)
            self._steps_in_round = 0
        self._steps_in_round += 1
        if self._reading is not None and not self._mover.is_busy and self._reading.done():
            assert self._read_N2 is not None
            self._reading = None
            self._swap(self.tracker.record(self._read_N2))

    def settle(self) -> None:
        """Between two steps of the model: swaps under way are completed, and the device is waited for."""
        self._wait()
        while self._mover.is_busy:
            self._finish_swaps()
            self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _finish_swaps(self) -> None:
        done = self._mover.finish()
        self.num_swaps += len(done)
        self.swap_bytes += sum(self._layers[swap.layer].slot_bytes for swap in done)
        back = (self._layers[swap.layer] for swap in done if self._places)
        self.returned_bytes += sum(layer.slot_bytes - layer.kept_bytes for layer in back)

    def _swap(self, heat: Heat) -> None:
        placements = [table.placement for table in self.tables]
        # An exchange moves two experts through host memory.
        share = self.swap_share / 2 if self._places else self.swap_share
        limit = swap_limit(
            placements, heat.hits_per_step_L, self._layers, self.settings.interval_steps, share
        )
        limit = min(limit, self.settings.max_swaps, self._most_swaps)
        swaps = self.settings.plan(placements, heat, limit)
        if swaps:
            if self._places:
                self._exchanging()
            self._mover.start(swaps)

    @property
    def _most_swaps(self) -> int:
        """What the host's memory allows in one round."""
        if isinstance(self._mover, ExchangeMover):
            return 0 if self._why_not_pinned else self._mover.num_free
        return 1 if self._why_not_pinned else self.settings.max_swaps

    def heat(self) -> Heat:
        """As of now; waits for the device. Errors: ValueError where nothing counts it."""
        if not self.counts:
            raise ValueError(
                "heat: no expert of this model can be on a GPU, so nothing is counted unless model.monde.watch_heat() "
                "asks for it; call it first, or set gpu_memory"
            )
        heat = self.tracker.read()
        missing_steps = self.settings.interval_steps - self._steps_in_round
        return Heat(heat.model, heat.count_L, max(heat.weight_steps - missing_steps, 0.0))

    # ---- weights ----
    def _fetched_layers(self, placements: Sequence[Placement]) -> list[int]:
        """Layers whose experts may come over the bus: some have no slot, and host memory has slots' form."""
        has_device = self.device.type == "cuda" or any(slots is not None for slots in self.slots)
        return [
            l
            for l, (bank, placement) in enumerate(zip(self._banks, placements, strict=True))
            if has_device and bank.choice.name == "native" and placement.num_resident < bank.spec.num_experts
        ]

    def _blobs_of(self, layer_idx: int) -> HostBlobs:
        places = self._places.get(layer_idx)
        return HostBlobs(self._banks[layer_idx], None if places is None else places.place_of_expert_E)

    def fetchable(self, layer_idx: int) -> HostBlobs | None:
        """The layer's experts on the host, where copies from there run at full speed; else None."""
        blobs = self._blobs.get(layer_idx)
        return blobs if self.device.type != "cuda" or layer_idx in self._pinned else None

    def moves(self, layer_idx: int) -> bool:
        """Whether this layer's residents may change, so that the host's bank must know them too."""
        return layer_idx in self._movable

    def loaded(self, layer_idx: int) -> None:
        """An expert was loaded into the layer's bank; with the last one the bank's memory is pinned.

        Only where experts lie: pinning would give memory to those that were never loaded.
        """
        if self.device.type != "cuda" or layer_idx not in self._blobs or layer_idx in self._pinned:
            return
        bank, blobs = self._banks[layer_idx], self._blobs[layer_idx]
        num_expected = bank.spec.num_experts
        if not self.moves(layer_idx) or layer_idx in self._places:
            num_expected -= self.tables[layer_idx].placement.num_resident
        if self._why_not_pinned or len(bank.loaded_experts) < num_expected:
            return
        places = [bank.place_of_expert_E[expert_id] for expert_id in bank.loaded_experts]
        if layer_idx in self._places:
            # Spare places follow all others; they go with the last layer that shares them.
            pool = self._places[layer_idx].pool
            sharing = {l for l, table in self._places.items() if table.pool is pool}
            places += pool.free if sharing <= {layer_idx, *self._pinned} else ()
        try:
            self._pinned[layer_idx] = [
                PinnedRange(*blobs.range_of(first, count), blobs, self.device)
                for first, count in runs(places)
            ]
        except RuntimeError as error:
            self._why_not_pinned = str(error)
            residents = (
                "stay as they are" if self._places else "change slowly, one at a time through a pinned buffer"
            )
            warnings.warn(
                f"residents {residents}, and prompts leave all experts without a slot to the host: {error}; "
                "raise `ulimit -l`",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """Wait for copies and unpin; nothing moves afterwards. Closing twice is fine."""
        self._read_N2 = self._reading = None
        self._mover.close()
        for ranges in self._pinned.values():
            for pinned in ranges:
                pinned.close()
        self._pinned.clear()
