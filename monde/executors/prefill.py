"""A layer's many tokens on GPU, bus and host at once: the counts are read back, a plan is made, everything streams.

    count     pairs per expert on the device, read back through pinned memory: the one wait for the device
    plan      residents stay, the heaviest others are fetched, the lightest go to the host, one may be cut along F;
              what the device does is laid out in one table, which goes up in one copy
    start     copies leave on their lane, the host's threads begin; then the device's products are launched, wave by
              wave as experts arrive
    wait      for the host, when nothing is left to launch; its sum and the device's rows are combined, and the next
              layer's certain fetches leave

No step of Python is per expert but for those that travel. Works on any device: where there are no streams everything
happens in order. Letters as in monde.core; N pairs that the device computes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hostcompute import Cut, ExpertBank
from hostcompute.layout import PAD_K
from monde.core import RoutedBatch
from monde.device.kernels.prefill import PrefillKernels
from monde.device.lanes import Mark
from monde.executors.fetch import Shipment
from monde.executors.host import HostTotals
from monde.executors.pieces import Piece, alone, in_whole, piece_layout, pieces_of
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import LayerPieces
from monde.executors.products import Packed, Products, Rows, combine
from monde.executors.waves import Order, Phases, Wave, tiles_of
from monde.planning.cost import ExpertShape
from monde.planning.formats import format_of
from monde.planning.split import ExpertSplit, Load, Where
from monde.planning.split_policies import all_host
from monde.weights.host import HostBlobs
from monde.weights.packing import TORCH_DTYPES
from monde.weights.slots import ExpertSlots, bias_sizes
from monde.weights.table import SlotTable


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
        weight_format = format_of(str(TORCH_DTYPES[self.spec.dtype]).removeprefix("torch."))
        self.shape = ExpertShape(
            self.spec.d_model,
            self.spec.d_ffn,
            self.spec.gated,
            weight_format.bits,
            weight_format=weight_format.name,
        )
        self._products_of: dict[torch.dtype, Products] = {}
        hub.layers[layer_idx] = self

    def reset_totals(self) -> None:
        self.totals = HostTotals()
        self.num_resident_pairs = self.num_fetched_pairs = 0
        self.phases = Phases()

    def forward(self, batch: RoutedBatch, y_dtype: torch.dtype | None = None) -> Tensor:
        """y_TD, every pair computed, summed in fp32, rounded once: to fp32 where that is asked for, else as x_TD.

        Errors: RuntimeError naming the layer when the host fails or is late; the next call works.
        """
        num_tokens, num_topk = batch.topk_ids_TK.shape
        step = self.hub.size.chunk_tokens(num_topk)
        chunks = [slice(i, i + step) for i in range(0, num_tokens, step)]
        y_dtype = y_dtype or batch.x_TD.dtype
        ys = [self._chunk(_part(batch, rows), y_dtype, rows is not chunks[-1]) for rows in chunks]
        if len(ys) == 1:
            return ys[0]
        return torch.cat(ys) if ys else torch.zeros_like(batch.x_TD, dtype=y_dtype)

    def _chunk(self, batch: RoutedBatch, y_dtype: torch.dtype, more: bool) -> Tensor:
        self.hub.enter()
        try:
            return self._streamed(batch, y_dtype, more)
        except BaseException:
            self.hub.recover()
            raise
        finally:
            self.hub.leave()

    def _streamed(self, batch: RoutedBatch, y_dtype: torch.dtype, more: bool) -> Tensor:
        hub, lanes, times = self.hub, self.hub.lanes, [time.perf_counter()]
        num_tokens, num_topk = batch.topk_ids_TK.shape
        # ---- count ----
        x_TD, weights_TK = _aligned(batch.x_TD.contiguous()), batch.topk_weights_TK.float().contiguous()
        kernels = hub.kernels(x_TD.dtype, self.spec)
        ids_TK, counts_E, counted = self._count(kernels, batch.topk_ids_TK, weights_TK)
        posted = None
        if self.slots is None or self.slots.num_slots < self.spec.num_experts:
            with lanes.on_back():
                counted.order()
                posted = hub.host.start(x_TD, ids_TK, weights_TK, self.totals)
        times.append(time.perf_counter())
        counted.wait()
        times.append(time.perf_counter())
        tokens_E = counts_E.numpy().copy()
        # ---- plan ----
        staged, blobs, cost = hub.take_prefetched(self), self.blobs(), hub.cost(self.shape)
        bus_busy_s = hub.bus_busy_s(staged, cost)
        slot_E = np.array(self.table.placement.slot_of_expert_E)
        resident = np.flatnonzero((slot_E >= 0) & (tokens_E > 0))
        resident = resident[np.argsort(slot_E[resident])]
        in_staging = np.array([p.expert_id for shipment in staged for p in shipment.pieces], np.int64)
        active = in_staging[(slot_E[in_staging] < 0) & (tokens_E[in_staging] > 0)]
        ready_E = slot_E >= 0
        ready_E[in_staging] = True
        load = Load(tokens_E, ready_E, num_tokens, PAD_K, bus_busy_s)
        split = hub.policy(load, cost) if blobs is not None else all_host(load, cost)
        fetched = np.flatnonzero(split.where_E == Where.FETCHED)
        fetched = fetched[np.argsort(-tokens_E[fetched], kind="stable")]
        cut = [] if split.cut_expert is None else [split.cut_expert]
        # ---- start ----
        sends = self._loads(fetched.tolist(), blobs)
        sends += [[piece] for e in cut for piece in pieces_of(e, split.cut_rows, self.size.piece_rows)]
        leaving, arriving = deque(sends), deque[Shipment]()

        def send() -> None:
            while leaving and hub.ring.has_room:
                assert blobs is not None
                arriving.append(hub.ring.fetch(blobs, leaving.popleft()))
                self.totals.h2d_bytes += arriving[-1].num_bytes

        send()
        on_host_E = split.where_E == Where.HOST
        pending = None
        if on_host_E.any():
            assert posted is not None
            pending = hub.host.submit(
                self.bank, posted, on_host_E, Cut(cut[0], split.cut_rows) if cut else None
            )
        times.append(time.perf_counter())
        order = Order.of(np.concatenate([active, resident, fetched, np.array(cut, np.int64)]), tokens_E)
        ahead_order = Order.of(active, tokens_E)  # of what has a slot by now, the slot is taken
        waves = [
            *(self._arriving(shipment.pieces, ahead_order) for shipment in staged),
            *self._resident_waves(resident, slot_E, order, x_TD.dtype),
            *(self._arriving(pieces, order) for pieces in sends),
        ]
        rows, tiles = self._rows(order, waves, ids_TK, x_TD, y_dtype)
        for i, wave in enumerate(waves):
            if i < len(staged):
                self._arrived(staged[i], wave, tiles[i], rows, blobs)
                send()
            elif i < len(waves) - len(sends):
                assert self.slots is not None
                packed = Packed(self.slots.blobs_SB, self.slots.biases)
                self._products(x_TD.dtype).multiply(wave, tiles[i], packed, rows, lambda: None)
            else:
                self._arrived(arriving[i - len(waves) + len(sends)], wave, tiles[i], rows, blobs)
                send()
        self.share_E, self.latest = tokens_E / max(1, int(tokens_E.sum())), split
        self.num_resident_pairs += int(tokens_E[resident].sum())
        self.num_fetched_pairs += int(tokens_E[active].sum() + tokens_E[fetched].sum())
        ahead = hub.look_ahead(self if more else hub.next_layer(self), num_tokens, num_topk)
        times.append(time.perf_counter())
        # ---- wait ----
        y_TD = None
        if pending is not None:
            answer = hub.host.wait(pending, self.layer_idx, self.totals)
            y_TD = answer.y_TD
            hub.heard(split.host_s - float(cost.round_trip_s(num_tokens)), answer.busy_s)
        times.append(time.perf_counter())
        hub.copied(split.copy_s - bus_busy_s, list(arriving))
        if posted is not None:
            posted.there.order()  # what was read may be freed only after that
        y_TD = self._combined(rows, weights_TK, y_TD, x_TD, y_dtype)
        # The host's sum has the bus for itself: a layer waits for it, and for nothing that is fetched ahead.
        hub.prefetch(ahead, None if pending is None else lanes.mark())
        times.append(time.perf_counter())
        self.phases.add(times)
        return y_TD

    def _count(
        self, kernels: PrefillKernels | None, topk_ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Mark]:
        """int64 ids, E where the pair counts for nothing, and pairs per expert in pinned memory, after the mark."""
        hub, E = self.hub, self.spec.num_experts
        counts_E = hub.host.counts(E)
        if kernels is not None:
            ids_TK = kernels.count(topk_ids_TK.long().contiguous(), weights_TK, counts_E)
        else:
            ids_TK = known_ids(topk_ids_TK, weights_TK, E)
            counts_E1 = torch.zeros(E + 1, dtype=torch.int64, device=ids_TK.device)
            counts_E1.scatter_add_(0, ids_TK.flatten(), torch.ones_like(ids_TK).flatten())
            counts_E.copy_(counts_E1[:-1], non_blocking=True)
        return ids_TK, counts_E, hub.lanes.mark()

    def _loads(self, experts: Sequence[int], blobs: HostBlobs | None) -> list[list[Piece]]:
        """Pieces by staging buffer. Neighbours in host memory travel in one copy: each buffer in their order."""
        if blobs is None:
            return []
        if not self.is_whole:
            return [[p] for e in experts for p in pieces_of(e, self.spec.d_ffn, self.size.piece_rows)]
        step = self.size.num_staged
        return [
            [Piece(e, 0, self.spec.d_ffn) for e in sorted(experts[i : i + step], key=blobs.place_of)]
            for i in range(0, len(experts), step)
        ]

    # ---- the device's rows ----
    def _rows(
        self, order: Order, waves: Sequence[Wave], ids_TK: Tensor, x_TD: Tensor, y_dtype: torch.dtype
    ) -> tuple[Rows, list[Tensor]]:
        """And the tiles of every wave; all that the device must be told goes up at once."""
        E, (tiles_n4, num_tiles) = len(order.begin_E), tiles_of(waves)
        told = self.hub.lanes.upload(np.concatenate([order.begin_E, tiles_n4.ravel()]))
        begin_E, tiles = told[:E], told[E:].view(-1, 4).split(num_tiles)
        position_TK, tokens_N = _place(self.hub.kernels(x_TD.dtype, self.spec), begin_E, order, ids_TK)
        dtype = torch.promote_types(x_TD.dtype, TORCH_DTYPES[self.spec.dtype])
        v_dtype = x_TD.dtype if self.is_whole and dtype == x_TD.dtype == y_dtype else torch.float32
        v_ND = torch.empty(order.num_rows + 1, self.spec.d_model, dtype=v_dtype, device=x_TD.device)
        v_ND[-1].zero_()
        h_NF = None
        if self._products(x_TD.dtype).panels is not None:
            f_pad_k = piece_layout(self.spec, min(self.size.piece_rows, self.spec.d_ffn)).f_pad_k
            h_NF = x_TD.new_empty(order.num_rows, f_pad_k)
        return Rows(x_TD, tokens_N, position_TK, v_ND, h_NF), list(tiles)

    def _combined(
        self, rows: Rows, weights_TK: Tensor, y_TD: Tensor | None, x_TD: Tensor, y_dtype: torch.dtype
    ) -> Tensor:
        kernels = self.hub.kernels(y_dtype, self.spec)  # rows of fp32 where the result is
        if (
            kernels is not None
        ):  # which read the host's sum where it lies, in no queue behind copies of experts
            return kernels.combine(rows.v_ND[:-1], rows.position_TK, weights_TK, y_TD)
        y_TD = None if y_TD is None else y_TD.to(x_TD.device, non_blocking=True)
        return combine(rows.v_ND, rows.position_TK, weights_TK, y_TD).to(y_dtype)

    def _products(self, x_dtype: torch.dtype) -> Products:
        if x_dtype not in self._products_of:
            hub = self.hub
            kernels = hub.kernels(x_dtype, self.spec)
            self._products_of[x_dtype] = Products(self.spec, x_dtype, hub.scratch_B, kernels, hub.block_rows)
        return self._products_of[x_dtype]

    def _resident_waves(
        self, resident: NDArray[np.int64], slot_E: NDArray[np.int64], order: Order, x_dtype: torch.dtype
    ) -> list[Wave]:
        """All of them at once where they need no scratch, a scratch full otherwise; piece after piece along F."""
        if not len(resident):
            return []
        assert self.slots is not None
        F, step = self.spec.d_ffn, self.size.piece_rows
        at_once = (
            len(resident)
            if self._products(x_dtype).panels is not None
            else self.size.num_unpacked
            if self.is_whole
            else 1
        )
        waves = []
        for i in range(0, len(resident), at_once):
            chosen = resident[i : i + at_once]
            slots = slot_E[chosen]
            for first_row in range(0, F, step):
                at, rows = in_whole(self.spec, first_row), (first_row, min(step, F - first_row))
                offsets_n = slots * self.slots.blobs_SB.stride(0)
                waves.append(Wave.of(chosen, rows, at, offsets_n, slots, order))
        return waves

    def _arriving(self, pieces: Sequence[Piece], order: Order) -> Wave:
        experts, i = np.array([piece.expert_id for piece in pieces]), np.arange(len(pieces))
        rows = (pieces[0].first_row, pieces[0].num_rows)
        stride_bytes = piece_layout(self.spec, rows[1]).blob_bytes
        return Wave.of(experts, rows, alone(self.spec, rows[1]), i * stride_bytes, i, order)

    def _arrived(
        self, shipment: Shipment, wave: Wave, tiles_n4: Tensor, rows: Rows, blobs: HostBlobs | None
    ) -> None:
        """Launch the products of what a buffer holds, behind its arrival."""
        assert blobs is not None
        shipment.arrived.order()
        if not len(wave.counts_n):
            self.hub.ring.release(shipment)
            return
        biases_of = [blobs.biases(p.expert_id) for p in shipment.pieces] if self.spec.has_bias else []
        biases = {
            role: self.hub.lanes.upload(np.stack([b[role].numpy() for b in biases_of]))
            for role in (bias_sizes(self.spec) if biases_of else ())
        }
        packed = Packed(shipment.buffer_B, biases)
        self._products(rows.x_TD.dtype).multiply(
            wave, tiles_n4, packed, rows, lambda: self.hub.ring.release(shipment)
        )


def known_ids(topk_ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """int64 ids, num_experts where the pair counts for nothing."""
    ids_TK = topk_ids_TK.long()
    counts_TK = (ids_TK >= 0) & (ids_TK < num_experts) & (weights_TK != 0)
    return torch.where(counts_TK, ids_TK, num_experts).contiguous()


def _place(
    kernels: PrefillKernels | None, begin_E: Tensor, order: Order, ids_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """position_TK of every pair, num_rows or more for others' pairs, and tokens_N."""
    if kernels is not None:
        return kernels.place(ids_TK, begin_E, order.num_rows)
    key_E1 = torch.cat([begin_E, begin_E.new_tensor([-1])])
    # Experts without tokens share a beginning with the next one, but no pair has them.
    key_R = key_E1[ids_TK.flatten()]
    sorted_R = torch.sort(torch.where(key_R < 0, order.num_rows, key_R), stable=True).indices
    position_R = torch.empty_like(sorted_R)
    position_R[sorted_R] = torch.arange(len(sorted_R), device=sorted_R.device)
    return position_R.view_as(ids_TK), sorted_R[: order.num_rows] // ids_TK.shape[1]


def _aligned(x_TD: Tensor) -> Tensor:
    """Kernels copy 16 bytes at a time."""
    return x_TD if x_TD.data_ptr() % 16 == 0 else x_TD.clone()


def _part(batch: RoutedBatch, rows: slice) -> RoutedBatch:
    return RoutedBatch(batch.x_TD[rows], batch.topk_ids_TK[rows], batch.topk_weights_TK[rows])
