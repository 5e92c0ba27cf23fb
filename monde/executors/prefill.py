"""A layer's many tokens on GPU, bus and host at once: the counts are read back, a plan is made, everything streams.

    count     pairs per expert on the device, read back through pinned memory: the one wait for the device
    plan      residents stay, the heaviest others are fetched, the lightest go to the host, one may be cut along F
    start     copies leave on their lane, the host's threads begin; then the device's products are launched, wave by
              wave as experts arrive
    wait      for the host, when nothing is left to launch; its sum and the device's rows are combined, and the next
              layer's certain fetches leave

Works on any device: where there are no streams everything happens in order. Letters as in monde.core; N pairs that
the device computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hostcompute import Cut, ExpertBank
from hostcompute.layout import PAD_K
from monde.core import RoutedBatch
from monde.executors.fetch import Shipment
from monde.executors.host import HostTotals
from monde.executors.pieces import Piece, alone, in_whole, pieces_of
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import LayerPieces
from monde.executors.products import Products, Wave, combine, ends_of
from monde.planning.cost import ExpertShape
from monde.planning.split import ExpertSplit, Load, Where
from monde.planning.split_policies import all_host
from monde.weights.host import HostBlobs
from monde.weights.packing import TORCH_DTYPES
from monde.weights.slots import ExpertSlots, bias_sizes
from monde.weights.table import SlotTable


@dataclass(frozen=True)
class Order:
    """The device's experts in the order in which they are computed, as rows [begin, begin + count)."""

    experts: list[int]
    begin: dict[int, int]
    tokens_E: NDArray[np.int64]
    num_rows: int

    @classmethod
    def of(cls, experts: list[int], tokens_E: NDArray[np.int64]) -> Order:
        ends = np.cumsum(tokens_E[experts], dtype=np.int64) if experts else np.zeros(0, np.int64)
        begins = [0, *ends.tolist()]
        return cls(experts, dict(zip(experts, begins, strict=False)), tokens_E, begins[-1])

    def rank_E1(self) -> NDArray[np.int64]:
        """Position of every expert, len(experts) for those that are computed elsewhere and for none."""
        rank_E1 = np.full(len(self.tokens_E) + 1, len(self.experts))
        rank_E1[self.experts] = np.arange(len(self.experts))
        return rank_E1


class PrefillExecutor:
    """One layer's share of a hub. Takes any batch.

    slots is None where no expert has one. blobs() gives the bank's experts where they can be fetched at full speed,
    None where they cannot: then the host computes all that have no slot.
    """

    def __init__(
        self,
        layer_idx: int,
        bank: ExpertBank,
        slots: ExpertSlots | None,
        table: SlotTable,
        hub: PrefillHub,
        blobs: Callable[[], HostBlobs | None],
    ) -> None:
        self.layer_idx, self.bank, self.spec = layer_idx, bank, bank.spec
        self.slots, self.table, self.hub, self.blobs = slots, table, hub, blobs
        self.reset_totals()
        self.size = LayerPieces.of(self.spec)
        self.is_whole = self.size.piece_rows >= self.spec.d_ffn  # an expert is one piece
        self.share_E: NDArray[np.float64] | None = None  # of the pairs, in the latest batch
        self.latest: ExpertSplit | None = None
        item_bits = 8 * self.spec.dtype.itemsize_bytes
        self.shape = ExpertShape(self.spec.d_model, self.spec.d_ffn, self.spec.gated, item_bits)
        self._products_of: dict[torch.dtype, Products] = {}
        hub.layers[layer_idx] = self

    def reset_totals(self) -> None:
        self.totals = HostTotals()
        self.num_resident_pairs = self.num_fetched_pairs = 0

    def forward(self, batch: RoutedBatch) -> Tensor:
        """y_TD like x_TD, every pair computed, summed in fp32, rounded once.

        Errors: RuntimeError naming the layer when the host fails or is late; the next call works.
        """
        num_tokens, num_topk = batch.topk_ids_TK.shape
        step = self.hub.size.chunk_tokens(num_topk)
        chunks = [slice(i, i + step) for i in range(0, num_tokens, step)]
        ys = [self._chunk(_part(batch, rows), rows is not chunks[-1]) for rows in chunks]
        if len(ys) == 1:
            return ys[0]
        return torch.cat(ys) if ys else torch.zeros_like(batch.x_TD)

    def _chunk(self, batch: RoutedBatch, more: bool) -> Tensor:
        self.hub.enter()
        try:
            return self._streamed(batch, more)
        except BaseException:
            self.hub.recover()
            raise
        finally:
            self.hub.leave()

    def _streamed(self, batch: RoutedBatch, more: bool) -> Tensor:
        hub, lanes, E = self.hub, self.hub.lanes, self.spec.num_experts
        num_tokens, num_topk = batch.topk_ids_TK.shape
        # ---- count ----
        x_TD, weights_TK = batch.x_TD.contiguous(), batch.topk_weights_TK.float().contiguous()
        ids_TK = known_ids(batch.topk_ids_TK, weights_TK, E)
        counts_E1 = torch.zeros(E + 1, dtype=torch.int64, device=ids_TK.device)
        counts_E1.scatter_add_(0, ids_TK.flatten(), torch.ones_like(ids_TK).flatten())
        counted_on_device = lanes.mark()
        posted = None
        with lanes.on_back():
            counted_on_device.order()
            counts = hub.host.read("counts", counts_E1)
            counted = lanes.mark()
            if self.slots is None or self.slots.num_slots < E:
                posted = hub.host.start(x_TD, ids_TK, weights_TK, self.totals)
        counted.wait()
        tokens_E = counts.numpy()[:-1].copy()
        # ---- plan ----
        staged, blobs = hub.take_prefetched(self), self.blobs()
        ready_E = np.array(self.table.placement.slot_of_expert_E) >= 0
        resident = np.flatnonzero(ready_E & (tokens_E > 0)).tolist()
        resident.sort(key=lambda e: self.table.placement.slot_of_expert_E[e])
        in_staging = [p.expert_id for shipment in staged for p in shipment.pieces if not ready_E[p.expert_id]]
        ready_E[in_staging] = True
        split = self.split(Load(tokens_E, ready_E, num_tokens, PAD_K), blobs)
        fetched = np.flatnonzero(split.where_E == Where.FETCHED)
        fetched = fetched[np.argsort(-tokens_E[fetched], kind="stable")].tolist()
        cut = [] if split.cut_expert is None else [split.cut_expert]
        active = [e for e in in_staging if tokens_E[e]]
        order = Order.of([*active, *resident, *fetched, *cut], tokens_E)
        # ---- start ----
        sends = deque(self._loads(fetched))
        if cut:
            sends.extend([piece] for piece in pieces_of(cut[0], split.cut_rows, self.size.piece_rows))
        arriving: deque[Shipment] = deque()

        def send() -> None:
            while sends and hub.ring.has_room:
                assert blobs is not None
                arriving.append(hub.ring.fetch(blobs, sends.popleft()))
                self.totals.h2d_bytes += arriving[-1].num_bytes

        send()
        on_host_E = split.where_E == Where.HOST
        pending = None
        if on_host_E.any():
            assert posted is not None
            pending = hub.host.submit(
                self.bank, posted, on_host_E, Cut(cut[0], split.cut_rows) if cut else None
            )
        rows = self._rows(order, ids_TK, x_TD)
        for shipment in staged:
            self._arrived(shipment, frozenset(active), order, rows, blobs)
            send()
        for wave in self._resident_waves(resident, order):
            self._multiply(wave, rows)
        copied: list[Shipment] = []
        while arriving:
            copied.append(arriving.popleft())
            self._arrived(copied[-1], frozenset(order.experts), order, rows, blobs)
            send()
        self.share_E, self.latest = tokens_E / max(1, int(tokens_E.sum())), split
        # ---- wait ----
        self.num_resident_pairs += int(tokens_E[resident].sum())
        self.num_fetched_pairs += int(tokens_E[[*active, *fetched]].sum())
        y_TD = None
        if pending is not None:
            answer = hub.host.wait(pending, self.layer_idx, self.totals)
            y_TD = answer.y_TD
            hub.heard(split.host_s - float(hub.cost(self.shape).round_trip_s(num_tokens)), answer.busy_s)
        hub.copied(split.copy_s, copied)
        if posted is not None:
            posted.there.order()  # what was read may be freed only after that
        y_TD = self._combined(rows, weights_TK, y_TD, x_TD)
        # The host's sum has the bus for itself: a layer waits for it, and for nothing that is fetched ahead.
        after = None if pending is None else lanes.mark()
        hub.prefetch(self if more else hub.next_layer(self), num_tokens, num_topk, after)
        return y_TD

    def split(self, load: Load, blobs: HostBlobs | None) -> ExpertSplit:
        cost = self.hub.cost(self.shape)
        return self.hub.policy(load, cost) if blobs is not None else all_host(load, cost)

    def _loads(self, experts: Sequence[int]) -> list[list[Piece]]:
        """Pieces by staging buffer. Neighbours in host memory travel in one copy: each buffer in their order."""
        if not self.is_whole:
            return [[p] for e in experts for p in pieces_of(e, self.spec.d_ffn, self.size.piece_rows)]
        step = self.size.num_staged
        return [
            [Piece(e, 0, self.spec.d_ffn) for e in sorted(experts[i : i + step])]
            for i in range(0, len(experts), step)
        ]

    # ---- the device's rows ----
    def _rows(self, order: Order, ids_TK: Tensor, x_TD: Tensor) -> Rows:
        num_topk = ids_TK.shape[1]
        rank_E1 = self.hub.lanes.upload(order.rank_E1())
        sorted_R = torch.sort(rank_E1[ids_TK.flatten()], stable=True).indices
        position_R = torch.empty_like(sorted_R)
        position_R[sorted_R] = torch.arange(len(sorted_R), device=sorted_R.device)
        tokens_N = sorted_R[: order.num_rows] // num_topk
        dtype = torch.promote_types(x_TD.dtype, TORCH_DTYPES[self.spec.dtype])
        v_dtype = x_TD.dtype if self.is_whole and dtype == x_TD.dtype else torch.float32
        v_ND = torch.empty(order.num_rows + 1, self.spec.d_model, dtype=v_dtype, device=x_TD.device)
        v_ND[-1].zero_()
        return Rows(x_TD, tokens_N, position_R.view_as(ids_TK), v_ND)

    def _combined(self, rows: Rows, weights_TK: Tensor, y_TD: Tensor | None, x_TD: Tensor) -> Tensor:
        kernels = self.hub.kernels(x_TD.dtype, self.spec)
        if (
            kernels is not None
        ):  # which read the host's sum where it lies, in no queue behind copies of experts
            return kernels.combine(rows.v_ND[:-1], rows.position_TK, weights_TK, y_TD)
        y_TD = None if y_TD is None else y_TD.to(x_TD.device, non_blocking=True)
        return combine(rows.v_ND, rows.position_TK, weights_TK, y_TD).to(x_TD.dtype)

    def _multiply(self, wave: Wave, rows: Rows, unpacked: Callable[[], None] = lambda: None) -> None:
        products = self._products(rows.x_TD.dtype)
        weights = products.unpack(wave)
        unpacked()
        ends_bn = None
        if products.takes_grouped(rows.x_TD.dtype, wave):
            ends_bn = self.hub.lanes.upload(np.asarray(ends_of(wave, self.hub.block_rows), np.int32))
        products.multiply(wave, weights, rows.x_TD, rows.tokens_N, rows.v_ND, ends_bn)

    def _products(self, x_dtype: torch.dtype) -> Products:
        if x_dtype not in self._products_of:
            hub = self.hub
            kernels = hub.kernels(x_dtype, self.spec)
            self._products_of[x_dtype] = Products(self.spec, hub.scratch_B, kernels, hub.block_rows)
        return self._products_of[x_dtype]

    def _resident_waves(self, experts: list[int], order: Order) -> list[Wave]:
        if not experts:
            return []
        assert self.slots is not None
        slots, blobs_SB = self.slots, self.slots.blobs_SB
        step = self.size.num_unpacked if self.is_whole else 1
        waves = []
        for i in range(0, len(experts), step):
            chosen = experts[i : i + step]
            slot_n = [self.table.placement.slot_of_expert_E[e] for e in chosen]
            biases = {role: torch.stack([b[s] for s in slot_n]) for role, b in slots.biases.items()}
            offsets = [s * blobs_SB.stride(0) for s in slot_n]
            pieces = [pieces_of(e, self.spec.d_ffn, self.size.piece_rows) for e in chosen]
            for same in zip(*pieces, strict=True):
                at, counts = in_whole(self.spec, same[0].first_row), [int(order.tokens_E[e]) for e in chosen]
                waves.append(Wave(same, blobs_SB, offsets, at, biases, order.begin[chosen[0]], counts))
        return waves

    def _arrived(
        self,
        shipment: Shipment,
        wanted_experts: frozenset[int],
        order: Order,
        rows: Rows,
        blobs: HostBlobs | None,
    ) -> None:
        """Launch the products of what a buffer holds, behind its arrival; those without tokens are left out."""
        assert blobs is not None
        wanted = [(i, p) for i, p in enumerate(shipment.pieces) if p.expert_id in wanted_experts]
        shipment.arrived.order()
        # Rows are in the order of execution: runs of consecutive rows make one wave.
        wanted.sort(key=lambda entry: order.begin[entry[1].expert_id])
        biases_of = [blobs.biases(p.expert_id) for _, p in wanted] if self.spec.has_bias else []
        biases = {
            role: self.hub.lanes.upload(np.stack([b[role].numpy() for b in biases_of]))
            for role in (bias_sizes(self.spec) if biases_of else ())
        }
        if not wanted:
            self.hub.ring.release(shipment)
            return
        pieces = [p for _, p in wanted]
        wave = Wave(
            pieces,
            shipment.buffer_B,
            [i * shipment.stride_bytes for i, _ in wanted],
            alone(self.spec, pieces[0].num_rows),
            biases,
            order.begin[pieces[0].expert_id],
            [int(order.tokens_E[p.expert_id]) for p in pieces],
        )
        self._multiply(wave, rows, lambda: self.hub.ring.release(shipment))


@dataclass(frozen=True)
class Rows:
    """The device's pairs: position_TK of each in the order of execution, tokens_N of the first N, results v_ND.

    v_ND has one row more, of zeros.
    """

    x_TD: Tensor
    tokens_N: Tensor
    position_TK: Tensor
    v_ND: Tensor


def known_ids(topk_ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """int64 ids, num_experts where the pair counts for nothing."""
    ids_TK = topk_ids_TK.long()
    counts_TK = (ids_TK >= 0) & (ids_TK < num_experts) & (weights_TK != 0)
    return torch.where(counts_TK, ids_TK, num_experts).contiguous()


def _part(batch: RoutedBatch, rows: slice) -> RoutedBatch:
    return RoutedBatch(batch.x_TD[rows], batch.topk_ids_TK[rows], batch.topk_weights_TK[rows])
