"""What the layers of one model share in long prompts: lanes, staging, scratch, the host's share, and the plan's data."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hostcompute import ExpertSpec
from monde.device.kernels.prefill import PrefillKernels
from monde.device.lanes import Mark, lanes_of
from monde.executors.fetch import Shipment, StagingRing
from monde.executors.host import HostTotals
from monde.executors.host_share import HostShare
from monde.executors.prefill_size import BLOCK_ROWS, NUM_BUFFERS, LayerPieces, PrefillSize
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.feedback import Feedback
from monde.planning.prefetch import certain_fetches
from monde.planning.profile import HardwareProfile
from monde.planning.split import ExpertSplit, Load, Where, best_split
from monde.planning.split_policies import SplitPolicy
from monde.planning.staging import Piece
from monde.weights.host import HostBlobs
from monde.weights.packing import TORCH_DTYPES
from monde.weights.table import SlotTable

_HOST = np.int8(Where.HOST)
_ANY = -1  # the latest layer, whichever it was
DEADLINE_S = 60.0  # a layer of thousands of tokens takes the slowest host we know a second


class Layer(Protocol):
    """What fetching ahead needs to know of a layer's executor."""

    layer_idx: int
    spec: ExpertSpec
    table: SlotTable
    size: LayerPieces
    shape: ExpertShape
    is_whole: bool
    share_E: NDArray[np.float64] | None
    totals: HostTotals

    def blobs(self) -> HostBlobs | None: ...


@dataclass(frozen=True)
class Ahead:
    """Experts that a layer will fetch in any case, by buffer."""

    layer: Layer
    blobs: HostBlobs
    loads: list[tuple[Piece, ...]]


class PrefillHub:
    """policy: how a layer is split; `learns`: whether plans follow what earlier ones took."""

    def __init__(
        self,
        device: torch.device,
        size: PrefillSize,
        profile: HardwareProfile,
        policy: SplitPolicy = best_split,
        deadline_s: float = DEADLINE_S,
        learns: bool | None = None,
    ) -> None:
        self.lanes, self.size, self.profile, self.policy = lanes_of(device), size, profile, policy
        self.learns = device.type == "cuda" if learns is None else learns
        self.fetches_ahead = True
        # The host, before there is a plan. What it begins on follows earlier plans, and so does the order of its sums:
        # where the CPU stands in for the GPU equal calls stay equal.
        self.begins = self.learns
        self.reads_counts = False  # of layers, too, whose experts all have slots
        self.host = HostShare(self.lanes, deadline_s)
        self.block_rows = BLOCK_ROWS
        self.layers: dict[int, Layer] = {}
        self.feedback = Feedback()
        self._on_host: dict[int, tuple[int, float]] = {}  # by layer: tokens, and the part of its cold experts
        self._has_kernels = device.type == "cuda" and importlib.util.find_spec("cupy") is not None
        self._kernels: dict[tuple[torch.dtype, torch.dtype], PrefillKernels] = {}
        self._ahead: tuple[int, list[Shipment]] = (-1, [])  # for which layer, and what
        self._ahead_since_s = 0.0
        self._cost: tuple[Feedback, dict[ExpertShape, CostModel]] = (self.feedback, {})
        self._copies: list[tuple[float, Mark, Mark]] = []  # planned seconds, first left, last arrived
        self._tail: Mark = self.lanes.main.mark()
        # Steps in any mode of autograd write to these; allocated once, so that no prompt meets a full device.
        with torch.inference_mode(False):
            self.scratch_B = torch.empty(size.scratch_bytes, dtype=torch.uint8, device=device)
            self.ring = StagingRing(self.lanes, NUM_BUFFERS, size.buffer_bytes)

    def kernels(self, x_dtype: torch.dtype, spec: ExpertSpec) -> PrefillKernels | None:
        if not self._has_kernels:
            return None
        key = (x_dtype, TORCH_DTYPES[spec.dtype])
        if key not in self._kernels:
            self._kernels[key] = PrefillKernels(*key, self.lanes.device, self.lanes.upload)
        return self._kernels[key]

    # ---- one batch at a time, on whichever stream ----
    def enter(self) -> None:
        self.lanes.begin()
        self.lanes.main.after(self._tail)
        self._learn_copies()

    def leave(self) -> None:
        self._tail = self.lanes.main.mark()

    def recover(self) -> None:
        """After an exception: what was launched is waited for, then buffers are free; the host keeps what it reads."""
        self.lanes.close()
        self.host.give_up()
        self._ahead = (-1, [])
        self.ring.release_all()

    # ---- ahead ----
    def next_layer(self, layer: Layer) -> Layer | None:
        later = [idx for idx in self.layers if idx > layer.layer_idx]
        return self.layers[min(later)] if later else None

    def look_ahead(self, layer: Layer | None, num_tokens: int, num_topk: int) -> Ahead | None:
        """What `layer` will fetch in any case; the bus would idle until its routing is known."""
        blobs = None if layer is None or not layer.is_whole or not self.fetches_ahead else layer.blobs()
        if layer is None or blobs is None:
            return None
        resident_E = layer.table.placement.slot_E >= 0
        if resident_E.all():
            return None
        num_experts, num_pairs = layer.spec.num_experts, num_tokens * num_topk
        share_E = np.full(num_experts, 1 / num_experts) if layer.share_E is None else layer.share_E
        limit = NUM_BUFFERS * layer.size.num_staged
        experts = certain_fetches(share_E * num_pairs, resident_E, num_tokens, self.cost(layer.shape), limit)
        return Ahead(layer, blobs, layer.size.staging.loads(experts, layer.spec.d_ffn))

    def prefetch(self, ahead: Ahead | None, after: Mark | None) -> None:
        """Start on it, after a mark if one is given."""
        if ahead is None:
            return
        layer = ahead.layer
        shipments = [self.ring.fetch(ahead.blobs, pieces, after) for pieces in ahead.loads]
        layer.totals.h2d_bytes += sum(shipment.num_bytes for shipment in shipments)
        self._ahead = (layer.layer_idx, shipments)
        self._ahead_since_s = time.perf_counter()

    def bus_busy_s(self, shipments: Sequence[Shipment], cost: CostModel) -> float:
        """What is left of the copies of shipments fetched ahead."""
        if not shipments or shipments[-1].arrived.done():
            return 0.0
        num_pieces = sum(len(shipment.pieces) for shipment in shipments)
        return max(0.0, num_pieces * float(cost.copy_s()) - (time.perf_counter() - self._ahead_since_s))

    def take_prefetched(self, layer: Layer) -> list[Shipment]:
        """What was fetched ahead for this layer; what was for another one is dropped."""
        layer_idx, shipments = self._ahead
        self._ahead = (-1, [])
        if layer_idx == layer.layer_idx:
            return shipments
        for shipment in shipments:
            self.ring.release(shipment)
        return []

    def forget(self) -> None:
        """Weights change, or their places: what was fetched ahead is old, or not what was meant."""
        for shipment in self._ahead[1]:
            self.ring.release(shipment)
        self._ahead = (-1, [])

    # ---- what the host begins on ----
    def planned(self, layer_idx: int, load: Load, split: ExpertSplit) -> None:
        """What `certain_for_host` goes by: a plan that was free to fetch."""
        num_cold = np.count_nonzero((load.tokens_E > 0) & ~load.resident_E)
        if num_cold:
            on_host = np.count_nonzero(split.where_E == _HOST) / num_cold
            self._on_host[layer_idx] = self._on_host[_ANY] = (load.num_tokens, on_host)

    def certain_for_host(
        self, layer_idx: int, tokens_E: NDArray[np.int64], ready_E: NDArray[np.bool_], num_tokens: int
    ) -> NDArray[np.bool_] | None:
        """Experts that the host begins on, as a plan takes a fifth of some layers' time: of the cold ones the lightest,
        half of the part that it got of this layer's latest batch of so many tokens, else of the latest layer's. The
        plan takes them as given. None: nobody yet."""
        if self.policy is not best_split or not self.begins:
            return None
        told = (self._on_host.get(idx, (0, 0.0)) for idx in (layer_idx, _ANY))
        on_host = next((part for latest_tokens, part in told if latest_tokens == num_tokens), 0.0)
        cold = np.flatnonzero((tokens_E > 0) & ~ready_E)
        lightest = cold[np.argsort(tokens_E[cold], kind="stable")[: int(len(cold) * on_host / 2)]]
        if len(lightest) == 0:
            return None
        begun_E = np.zeros(len(tokens_E), np.bool_)
        begun_E[lightest] = True
        return begun_E

    # ---- what the plan goes by ----
    def cost(self, shape: ExpertShape) -> CostModel:
        if not self.feedback.is_close(self._cost[0]):
            self._cost = (self.feedback, {})
        costs = self._cost[1]
        if shape not in costs:
            costs[shape] = self.feedback.cost(CostModel(self.profile, shape))
        return costs[shape]

    def heard(self, planned_s: float, measured_s: float) -> None:
        if self.learns:
            self.feedback = self.feedback.after_host(planned_s, measured_s)

    def copied(self, planned_s: float, shipments: list[Shipment]) -> None:
        if self.learns and shipments:
            self._copies.append((planned_s, shipments[0].left, shipments[-1].arrived))

    def _learn_copies(self) -> None:
        waiting = []
        for planned_s, left, arrived in self._copies:
            measured_s = arrived.since_s(left)
            if measured_s is None:
                waiting.append((planned_s, left, arrived))
            else:
                self.feedback = self.feedback.after_copy(planned_s, measured_s)
        self._copies = waiting

    def close(self) -> None:
        """Wait for copies under way: host memory may go afterwards."""
        self.forget()
        self.lanes.close()
