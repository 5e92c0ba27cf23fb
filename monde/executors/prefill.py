"""A layer's many tokens on GPU, bus and host at once: the counts are read back, a plan is made, everything streams.

    count     pairs per expert on the device, read back through pinned memory: the one wait for the device
    plan      residents stay, the heaviest others are fetched, the lightest go to the host, one may be cut along F;
              planning.prefill_schedule makes tasks of it, those of bus and host first. The host has begun by then,
              on experts that no plan like the last one would take from it
    do        the tasks, in their order: copies leave on their lane, the host's threads begin, the device's rows are
              laid out in one table, products are launched as experts arrive
    combine   the host is waited for when nothing is left to launch; its sum and the device's rows are combined, and
              the next layer's certain fetches leave

A layer whose experts all have slots needs no plan: its counts stay on the device, and Python goes on to the next one.

No step of Python is per expert but for those that travel. Works on any device: where there are no streams everything
happens in order. Letters as in monde.core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hostcompute import Cut, ExpertBank
from hostcompute.layout import PAD_K
from monde.core import RoutedBatch
from monde.device.kernels.prefill import PrefillKernels
from monde.device.lanes import Mark
from monde.executors.device_part import DevicePart
from monde.executors.fetch import Shipment
from monde.executors.host import HostTotals
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import LayerPieces
from monde.executors.waves import Order, Phases
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.formats import format_of
from monde.planning.prefill_schedule import (
    Arriving,
    Combine,
    Fetch,
    Multiply,
    OnHost,
    Place,
    PrefillTasks,
    Residents,
)
from monde.planning.schedule import ScheduleBuilder
from monde.planning.split import ExpertSplit, Load, Where
from monde.planning.split_policies import all_host
from monde.planning.staging import Piece
from monde.weights.host import HostBlobs
from monde.weights.packing import TORCH_DTYPES
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable


@dataclass(frozen=True)
class Planned:
    """What a chunk's tasks are made of. staged: what had been fetched ahead, by shipment."""

    load: Load
    split: ExpertSplit
    slot_E: NDArray[np.int64]
    staged: Sequence[tuple[Piece, ...]]


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
        self.size = LayerPieces.of(self.spec)
        self.is_whole = self.size.piece_rows >= self.spec.d_ffn  # an expert is one piece
        self.device = DevicePart(self.spec, slots, self.size, hub)
        self.reset_totals()
        self.share_E: NDArray[np.float64] | None = None  # of the pairs, in the latest batch
        self.latest: Planned | None = None
        weight_format = format_of(str(TORCH_DTYPES[self.spec.dtype]).removeprefix("torch."))
        self.shape = ExpertShape(
            self.spec.d_model,
            self.spec.d_ffn,
            self.spec.gated,
            weight_format.bits,
            weight_format=weight_format.name,
        )
        hub.layers[layer_idx] = self

    def reset_totals(self) -> None:
        self.totals = HostTotals()
        self._num_resident_pairs = self.num_fetched_pairs = 0
        self.device.num_pairs_1.zero_()
        self.phases = Phases()

    @property
    def num_resident_pairs(self) -> int:
        """Waits for the device."""
        return self._num_resident_pairs + int(self.device.num_pairs_1.item())

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
            reads_counts = self.hub.reads_counts or not self.device.has_everything(
                self.table, batch.x_TD.dtype
            )
            return (self._streamed if reads_counts else self._resident)(batch, y_dtype, more)
        except BaseException:
            self.hub.recover()
            raise
        finally:
            self.hub.leave()

    def _resident(self, batch: RoutedBatch, y_dtype: torch.dtype, more: bool) -> Tensor:
        hub, times = self.hub, [time.perf_counter()]
        x_TD, weights_TK = _aligned(batch.x_TD.contiguous()), batch.topk_weights_TK.float().contiguous()
        for shipment in hub.take_prefetched(self):  # they have got slots since
            hub.ring.release(shipment)
        times += [times[0]] * 3
        y_TD = self.device.everything(self.table, x_TD, batch.topk_ids_TK, weights_TK, y_dtype)
        times += [time.perf_counter()] * 2
        if not more:
            hub.prefetch(hub.look_ahead(hub.next_layer(self), *batch.topk_ids_TK.shape), None)
        times.append(time.perf_counter())
        self.phases.add(times)
        return y_TD

    def _streamed(self, batch: RoutedBatch, y_dtype: torch.dtype, more: bool) -> Tensor:
        hub, lanes, times = self.hub, self.hub.lanes, [time.perf_counter()]
        num_tokens, num_topk = batch.topk_ids_TK.shape
        # ---- count ----
        x_TD, weights_TK = _aligned(batch.x_TD.contiguous()), batch.topk_weights_TK.float().contiguous()
        kernels = hub.kernels(x_TD.dtype, self.spec)
        self.device.products(x_TD.dtype)  # compiled before copies leave, whose seconds are learnt from
        has_cold = self.slots is None or self.slots.num_slots < self.spec.num_experts
        rows_TD = hub.host.start(x_TD) if has_cold else None
        ids_TK, counts_E, counted = self._count(kernels, batch.topk_ids_TK, weights_TK)
        posted = None
        if rows_TD is not None:
            posted = hub.host.post(rows_TD, ids_TK, weights_TK, counted, self.totals)
        times.append(time.perf_counter())
        counted.wait()
        lanes.uploaded()  # by the batch before, and that is done
        times.append(time.perf_counter())
        # ---- plan ----
        staged, blobs, cost = hub.take_prefetched(self), self.blobs(), hub.cost(self.shape)
        slot_E = self.table.placement.slot_E
        load = self._load(counts_E.numpy().copy(), slot_E, num_tokens, staged, blobs, cost)
        waits_E = load.begun_E  # for somebody to tell the host
        if waits_E is not None:
            assert posted is not None
            if (
                posted.there.done()
            ):  # else the bus should have its first fetch before anybody waits for the rows
                hub.host.submit(self.bank, posted, waits_E)
                waits_E = None
        split = hub.policy(load, cost) if blobs is not None else all_host(load, cost)
        plan = self.latest = Planned(load, split, slot_E, [shipment.pieces for shipment in staged])
        if blobs is not None:
            hub.planned(self.layer_idx, load, split)
        # ---- do ----
        shipments, fetched = dict[int, Shipment](), list[Shipment]()
        tasks = ScheduleBuilder()
        in_order = PrefillTasks(tasks, load, split, cost, self.size.staging, slot_E, plan.staged).in_order()
        for position, task in in_order:
            match task.payload:
                case Arriving(idx):
                    shipments[position] = staged[idx]
                case Fetch(pieces):
                    assert blobs is not None
                    shipments[position] = hub.ring.fetch(blobs, pieces)
                    fetched.append(shipments[position])
                case OnHost(on_host_E, cut_expert, cut_rows):
                    assert posted is not None
                    cut = None if cut_expert is None else Cut(cut_expert, cut_rows)
                    if waits_E is not None:
                        on_host_E = on_host_E | waits_E
                    if on_host_E.any():
                        hub.host.submit(self.bank, posted, on_host_E, cut)
                case Place(experts):
                    times.append(time.perf_counter())
                    order = Order.of(experts, load.tokens_E)
                    placed = self.device.place(tasks.tasks, order, slot_E, x_TD, ids_TK, y_dtype)
                case Residents():
                    self.device.multiply_residents(placed, position)
                case Multiply():
                    assert blobs is not None
                    self.device.multiply_arrived(placed, position, shipments[task.after[0]], blobs)
                case None:  # seconds that nobody does anything for
                    pass
                case Combine():  # the last one
                    break
                case other:
                    raise AssertionError(other)
        self._account(plan, sum(shipment.num_bytes for shipment in fetched))
        ahead = hub.look_ahead(self if more else hub.next_layer(self), num_tokens, num_topk)
        times.append(time.perf_counter())
        # ---- combine ----
        answer = hub.host.wait(self.layer_idx, self.totals)
        if answer is not None:
            hub.heard(split.host_s - split.trip_s, answer.busy_s)
        times.append(time.perf_counter())
        hub.copied(split.copy_s - load.bus_busy_s, fetched)
        if posted is not None:
            lanes.main.after(posted.there)  # what was read may be freed only after that
        y_TD = self.device.combine(placed, weights_TK, None if answer is None else answer.y_TD, y_dtype)
        # The host's sum has the bus for itself: a layer waits for it, and for nothing that is fetched ahead.
        hub.prefetch(ahead, lanes.main.mark() if answer else None)
        times.append(time.perf_counter())
        self.phases.add(times)
        return y_TD

    def _load(
        self,
        tokens_E: NDArray[np.int64],
        slot_E: NDArray[np.int64],
        num_tokens: int,
        staged: Sequence[Shipment],
        blobs: HostBlobs | None,
        cost: CostModel,
    ) -> Load:
        ready_E = slot_E >= 0
        ready_E[[piece.expert_id for shipment in staged for piece in shipment.pieces]] = True
        begun_E = (
            None
            if blobs is None
            else self.hub.certain_for_host(self.layer_idx, tokens_E, ready_E, num_tokens)
        )
        return Load(tokens_E, ready_E, num_tokens, PAD_K, self.hub.bus_busy_s(staged, cost), begun_E)

    def _account(self, plan: Planned, fetched_bytes: int) -> None:
        tokens_E, where_E = plan.load.tokens_E, plan.split.where_E
        is_resident_E = (where_E == Where.RESIDENT) & (plan.slot_E >= 0)
        on_device_E = (where_E == Where.RESIDENT) | (where_E == Where.FETCHED)
        self.share_E = tokens_E / max(1, int(tokens_E.sum()))
        self._num_resident_pairs += int(tokens_E[is_resident_E].sum())
        self.num_fetched_pairs += int(tokens_E[on_device_E & ~is_resident_E].sum())
        self.totals.h2d_bytes += fetched_bytes

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
        return ids_TK, counts_E, hub.lanes.main.mark()


def known_ids(topk_ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """int64 ids, num_experts where the pair counts for nothing."""
    ids_TK = topk_ids_TK.long()
    counts_TK = (ids_TK >= 0) & (ids_TK < num_experts) & (weights_TK != 0)
    return torch.where(counts_TK, ids_TK, num_experts).contiguous()


def _aligned(x_TD: Tensor) -> Tensor:
    """Kernels copy 16 bytes at a time."""
    return x_TD if x_TD.data_ptr() % 16 == 0 else x_TD.clone()


def _part(batch: RoutedBatch, rows: slice) -> RoutedBatch:
    return RoutedBatch(batch.x_TD[rows], batch.topk_ids_TK[rows], batch.topk_weights_TK[rows])
