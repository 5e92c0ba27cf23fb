"""What the device does of a layer's prompt: rows laid out by expert, products of slots and buffers, the sum.

Letters as in monde.core; N pairs that the device computes, n pieces of experts in a wave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hostcompute import ExpertSpec
from monde.device.kernels.panels import Tiles
from monde.device.kernels.prefill import PrefillKernels
from monde.executors.fetch import Shipment
from monde.executors.pieces import alone, in_whole, piece_layout
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import LayerPieces
from monde.executors.products import Packed, Products, Rows, combine
from monde.executors.waves import Order, Wave, tiles_of
from monde.planning.prefill_schedule import Multiply, Residents
from monde.planning.schedule import Task
from monde.weights.host import HostBlobs
from monde.weights.packing import TORCH_DTYPES
from monde.weights.slots import ExpertSlots, bias_sizes
from monde.weights.table import SlotTable


@dataclass(frozen=True)
class Placed:
    """The device's rows, and by position of a task its waves with their tiles, which lie in `told`."""

    rows: Rows
    waves: dict[int, list[tuple[Wave, Tiles]]]
    told: Tensor


class DevicePart:
    """Of one layer."""

    def __init__(
        self, spec: ExpertSpec, slots: ExpertSlots | None, size: LayerPieces, hub: PrefillHub
    ) -> None:
        self.spec, self.slots, self.size, self.hub = spec, slots, size, hub
        self.is_whole = size.piece_rows >= spec.d_ffn
        self._products: dict[torch.dtype, Products] = {}
        with torch.inference_mode(False):  # steps in any mode add to it
            self.num_pairs_1 = torch.zeros(1, dtype=torch.int64, device=hub.lanes.device)  # of `everything`

    def products(self, x_dtype: torch.dtype) -> Products:
        if x_dtype not in self._products:
            hub = self.hub
            kernels = hub.kernels(x_dtype, self.spec)
            self._products[x_dtype] = Products(self.spec, x_dtype, hub.scratch_B, kernels, hub.block_rows)
        return self._products[x_dtype]

    def place(
        self,
        tasks: Sequence[Task],
        order: Order,
        slot_E: NDArray[np.int64],
        x_TD: Tensor,
        ids_TK: Tensor,
        y_dtype: torch.dtype,
    ) -> Placed:
        """Room for the results, and the waves of all tasks; all that the device must be told goes up at once."""
        waves_of: dict[int, list[Wave]] = {}
        for position, task in enumerate(tasks):
            if isinstance(task.payload, Residents):
                waves_of[position] = self._resident_waves(task.payload.experts, slot_E, order, x_TD.dtype)
            elif isinstance(task.payload, Multiply):
                waves_of[position] = self._arriving(task.payload, order)
        tiles_n4, num_tiles = tiles_of(
            [wave for waves in waves_of.values() for wave in waves], self.products(x_TD.dtype).tile_rows
        )
        E = len(order.begin_E)
        told = self.hub.lanes.upload(np.concatenate([order.begin_E, tiles_n4.ravel()]))
        begin_E, kernels = told[:E], self.hub.kernels(x_TD.dtype, self.spec)
        firsts = np.cumsum([0, *num_tiles]) * tiles_n4.itemsize * tiles_n4.shape[1]
        tiles = map(Tiles, (told.data_ptr() + told.itemsize * E + firsts[:-1]).tolist(), num_tiles)
        position_TK, tokens_N = _place(kernels, begin_E, order, ids_TK)
        return Placed(
            self._rows(x_TD, tokens_N, position_TK, y_dtype),
            {
                position: list(zip(waves, islice(tiles, len(waves)), strict=True))
                for position, waves in waves_of.items()
            },
            told,
        )

    def _rows(self, x_TD: Tensor, tokens_N: Tensor, position_TK: Tensor, y_dtype: torch.dtype) -> Rows:
        """With room for what is computed of them."""
        num_rows, products = len(tokens_N), self.products(x_TD.dtype)
        dtype = torch.promote_types(x_TD.dtype, TORCH_DTYPES[self.spec.dtype])
        v_dtype = x_TD.dtype if self.is_whole and dtype == x_TD.dtype == y_dtype else torch.float32
        v_ND = torch.empty(num_rows + 1, self.spec.d_model, dtype=v_dtype, device=x_TD.device)
        if self.hub.kernels(x_TD.dtype, self.spec) is None:
            v_ND[-1].zero_()
        h_NF = None
        if products.panels is not None:
            f_pad_k = piece_layout(self.spec, min(self.size.piece_rows, self.spec.d_ffn)).f_pad_k
            h_NF = x_TD.new_empty(num_rows, f_pad_k)
        return Rows(x_TD, tokens_N, position_TK, v_ND, h_NF)

    # ---- layers whose experts all have slots ----
    def has_everything(self, table: SlotTable, x_dtype: torch.dtype) -> bool:
        """Whether `everything` can be asked: the slots hold all experts, and their panels are multiplied as they are."""
        if self.slots is None or self.slots.num_slots < self.spec.num_experts:
            return False
        return self.products(x_dtype).panels is not None and bool((table.placement.slot_E >= 0).all())

    def everything(
        self, table: SlotTable, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, y_dtype: torch.dtype
    ) -> Tensor:
        """y_TD of a whole layer. The counts stay on the device: nobody waits for them, and Python runs ahead."""
        assert self.slots is not None
        products, kernels = self.products(x_TD.dtype), self.hub.kernels(x_TD.dtype, self.spec)
        assert kernels is not None
        counts_E = torch.empty(self.spec.num_experts, dtype=torch.int64, device=x_TD.device)
        ids_TK = kernels.count(ids_TK.long().contiguous(), weights_TK, counts_E)
        max_pairs, stride_bytes = ids_TK.numel(), self.slots.blobs_SB.stride(0)
        begin_E, tiles_4 = kernels.lay_out(
            counts_E, table.slot_of_expert_E1, stride_bytes, self.num_pairs_1, max_pairs
        )
        position_TK, tokens_N = kernels.place(ids_TK, begin_E, max_pairs)
        rows = self._rows(x_TD, tokens_N, position_TK, y_dtype)
        packed, tiles = (
            Packed(self.slots.blobs_SB, self.slots.biases),
            Tiles(tiles_4.data_ptr(), len(tiles_4)),
        )
        F, step = self.spec.d_ffn, self.size.piece_rows
        for first_row in range(0, F, step):
            pieces = (first_row, min(step, F - first_row), in_whole(self.spec, first_row))
            products.from_panels(pieces, tiles, packed, rows)
        return self.combine(Placed(rows, {}, tiles_4), weights_TK, None, y_dtype)

    # ---- layers with a plan ----
    def multiply_residents(self, placed: Placed, position: int) -> None:
        assert self.slots is not None
        packed, rows = Packed(self.slots.blobs_SB, self.slots.biases), placed.rows
        for wave, tiles in placed.waves[position]:
            self.products(rows.x_TD.dtype).multiply(wave, tiles, packed, rows, lambda: None)

    def multiply_arrived(self, placed: Placed, position: int, shipment: Shipment, blobs: HostBlobs) -> None:
        """Launch the products of what a buffer holds, behind its arrival; then it is free."""
        self.hub.lanes.main.after(shipment.arrived)
        if not placed.waves[position]:
            self.hub.ring.release(shipment)
            return
        [(wave, tiles)] = placed.waves[position]
        biases_of = [blobs.biases(p.expert_id) for p in shipment.pieces] if self.spec.has_bias else []
        biases = {
            role: self.hub.lanes.upload(np.stack([b[role].numpy() for b in biases_of]))
            for role in (bias_sizes(self.spec) if biases_of else ())
        }
        packed, rows = Packed(shipment.buffer_B, biases), placed.rows
        self.products(rows.x_TD.dtype).multiply(
            wave, tiles, packed, rows, lambda: self.hub.ring.release(shipment)
        )

    def combine(
        self, placed: Placed, weights_TK: Tensor, y_TD: Tensor | None, y_dtype: torch.dtype
    ) -> Tensor:
        """The sum a token of the device's rows and of y_TD, the host's in pinned memory."""
        rows = placed.rows
        kernels = self.hub.kernels(y_dtype, self.spec)  # rows of fp32 where the result is
        if kernels is not None:
            # It reads the host's sum where it lies, in no queue behind copies of experts.
            return kernels.combine(rows.v_ND[:-1], rows.position_TK, weights_TK, y_TD)
        y_TD = None if y_TD is None else y_TD.to(rows.x_TD.device, non_blocking=True)
        return combine(rows.v_ND, rows.position_TK, weights_TK, y_TD).to(y_dtype)

    def _resident_waves(
        self, residents: NDArray[np.int64], slot_E: NDArray[np.int64], order: Order, x_dtype: torch.dtype
    ) -> list[Wave]:
        """All of them at once where they need no scratch, a scratch full otherwise; piece after piece along F."""
        assert self.slots is not None
        F, step = self.spec.d_ffn, self.size.piece_rows
        at_once = (
            len(residents)
            if self.products(x_dtype).panels is not None
            else self.size.num_unpacked
            if self.is_whole
            else 1
        )
        waves = []
        for i in range(0, len(residents), at_once):
            chosen = residents[i : i + at_once]
            slots = slot_E[chosen]
            for first_row in range(0, F, step):
                at, rows = in_whole(self.spec, first_row), (first_row, min(step, F - first_row))
                offsets_n = slots * self.slots.blobs_SB.stride(0)
                waves.append(Wave.of(chosen, rows, at, offsets_n, slots, order))
        return waves

    def _arriving(self, multiply: Multiply, order: Order) -> list[Wave]:
        pieces = multiply.pieces
        if not pieces:
            return []
        experts, places = np.array([piece.expert_id for piece in pieces]), np.array(multiply.places)
        rows = (pieces[0].first_row, pieces[0].num_rows)
        stride_bytes = piece_layout(self.spec, rows[1]).blob_bytes
        return [Wave.of(experts, rows, alone(self.spec, rows[1]), places * stride_bytes, places, order)]


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
