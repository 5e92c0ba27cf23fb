"""Many tokens by some experts on the device: one wave's pieces. Decides nothing.

bf16 by bf16 goes straight from the panels of slots and staging (kernels/panels.cu), two launches a wave. For every
other pair of types, and where there are no kernels, pieces are unpacked into row-major scratch and multiplied by the
libraries, one expert after the other.

Letters: n pieces of experts, N pairs of the device in the order of their experts, D model dim, F rows of a piece,
padded to 16 (F16) or 32; P panels, U matrices of a unit (gate and up, or up).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hostcompute import ExpertSpec, make_layout
from hostcompute.layout import LANES
from monde.device.kernels.panels import MMA, Kind, PieceRecord, Tiles
from monde.device.kernels.prefill import PrefillKernels
from monde.executors.activations import activate
from monde.executors.pieces import PackedAt, piece_layout
from monde.executors.waves import Wave
from monde.weights.packing import TORCH_DTYPES
from monde.weights.slots import bias_sizes


@dataclass(frozen=True)
class Rows:
    """The device's pairs: position_TK of each in the order of execution, tokens_N of the first N, results v_ND.

    v_ND has one row more, of zeros where there are no kernels. h_NF: room for a wave's hidden values, whatever the rows of its pieces.
    """

    x_TD: Tensor
    tokens_N: Tensor
    position_TK: Tensor
    v_ND: Tensor
    h_NF: Tensor | None


@dataclass(frozen=True)
class Packed:
    """What holds a wave's pieces: blobs_B, and by role biases [rows, size] in fp32, of the whole experts."""

    blobs_B: Tensor
    biases: Mapping[str, Tensor]


class Products:
    """Of one layer, for activations of x_dtype. scratch_B: uint8, shared by a model's layers; one stream at a time."""

    def __init__(
        self,
        spec: ExpertSpec,
        x_dtype: torch.dtype,
        scratch_B: Tensor,
        kernels: PrefillKernels | None,
        block_rows: int,
    ) -> None:
        self.spec, self.block_rows = spec, block_rows
        self._scratch_B, self._kernels = scratch_B, kernels
        self._w_dtype = TORCH_DTYPES[spec.dtype]
        self._dtype = torch.promote_types(x_dtype, self._w_dtype)
        self._num_in = 2 if spec.gated else 1
        self._records: dict[tuple[int, int, PackedAt], PieceRecord] = {}
        self.tile_rows = MMA.tile_rows if kernels is None else kernels.tile_rows
        # Rows are copied 16 bytes at a time.
        self.panels = (
            kernels if kernels is not None and kernels.has_panels and spec.d_model % 8 == 0 else None
        )
        if self.panels is not None:
            self.panels.build_panels(Kind(spec.activation.kind, spec.gated))

    # ---- one wave ----
    def multiply(
        self, wave: Wave, tiles: Tiles, packed: Packed, rows: Rows, read: Callable[[], None]
    ) -> None:
        """v_ND of the wave's rows; added to where its pieces do not begin their experts.

        tiles: the wave's part of waves.tiles_of. read: called once all that reads `packed` is launched.
        """
        if self.panels is not None:
            self.from_panels((wave.first_row, wave.num_rows, wave.at), tiles, packed, rows)
            read()
            return
        in_nKD, down_nDF = self.unpack(wave, packed.blobs_B)
        read()
        self._one_by_one(wave, packed.biases, in_nKD.to(self._dtype), down_nDF.to(self._dtype), rows)

    def from_panels(
        self, pieces: tuple[int, int, PackedAt], tiles: Tiles, packed: Packed, rows: Rows
    ) -> None:
        """The same of tiles alone; pieces: their first and number of rows of F, and where they lie."""
        assert self.panels is not None
        assert rows.h_NF is not None
        if pieces not in self._records:
            first_row, num_rows, at = pieces
            layout, sizes = piece_layout(self.spec, num_rows), bias_sizes(self.spec)
            self._records[pieces] = PieceRecord.of(self.spec, layout, at, first_row, sizes)
        self.panels.panels(
            self._records[pieces],
            tiles,
            packed.blobs_B,
            packed.biases,
            rows.x_TD,
            rows.tokens_N,
            rows.h_NF,
            rows.v_ND,
        )

    def unpack(self, wave: Wave, blobs_B: Tensor) -> tuple[Tensor, Tensor]:
        """in_nUFD [n, U * F16, Dpad] and down_nDF [n, D16, Fpad], in scratch; then the blobs may change."""
        layout = piece_layout(self.spec, wave.num_rows)
        n, in_rows = len(wave.offsets_n), self._num_in * layout.num_f_panels * LANES
        in_shape, down_shape = (n, in_rows, layout.d_pad_k), (n, layout.num_d_panels * LANES, layout.f_pad_k)
        num_in, num_down = n * in_shape[1] * in_shape[2], n * down_shape[1] * down_shape[2]
        values = self._scratch_B.view(self._w_dtype)
        in_nKD = values[:num_in].view(in_shape)
        down_nDF = values[num_in : num_in + num_down].view(down_shape)
        if self._kernels is not None:
            self._kernels.unpack(self.spec, layout, blobs_B, wave.offsets_n, wave.at, in_nKD, down_nDF)
        else:
            for i, offset_bytes in enumerate(wave.offsets_n.tolist()):
                self._unpack_one(wave, blobs_B, offset_bytes, in_nKD[i], down_nDF[i])
        return in_nKD, down_nDF

    def _unpack_one(
        self, wave: Wave, blobs_B: Tensor, offset_bytes: int, in_KD: Tensor, down_DF: Tensor
    ) -> None:
        whole, layout = make_layout(self.spec), piece_layout(self.spec, wave.num_rows)
        U, P, k_group, item = (
            self._num_in,
            layout.num_f_panels,
            layout.k_group,
            self.spec.dtype.itemsize_bytes,
        )
        line = LANES * k_group
        values = blobs_B.view(self._w_dtype)
        start = values.storage_offset()
        # [P, U, D / k_group, 16, k_group] and [D / 16, F / k_group, 16, k_group]
        ins = values.as_strided(
            (P, U, layout.d_pad_k // k_group, LANES, k_group),
            (U * whole.in_panel_bytes // item, whole.in_panel_bytes // item, line, k_group, 1),
            start + (offset_bytes + wave.at.in_offset_bytes) // item,
        )
        downs = values.as_strided(
            (layout.num_d_panels, layout.f_pad_k // k_group, LANES, k_group),
            (wave.at.down_panel_bytes // item, line, k_group, 1),
            start + (offset_bytes + wave.at.down_offset_bytes) // item,
        )
        in_KD.view(U, P, LANES, -1, k_group).copy_(ins.permute(1, 0, 3, 2, 4))
        down_DF.view(layout.num_d_panels, LANES, -1, k_group).copy_(downs.permute(0, 2, 1, 3))

    def _one_by_one(
        self, wave: Wave, biases: Mapping[str, Tensor], in_nKD: Tensor, down_nDF: Tensor, rows: Rows
    ) -> None:
        D, f16 = self.spec.d_model, in_nKD.shape[1] // self._num_in
        pieces = zip(wave.bias_rows_n.tolist(), wave.begins_n.tolist(), wave.counts_n.tolist(), strict=True)
        for i, (bias_row, begin, count) in enumerate(pieces):
            bias_K = _in_bias(biases, bias_row, slice(wave.first_row, wave.first_row + f16))
            bias_D = (
                biases["down_bias"][bias_row, :D] if "down_bias" in biases and not wave.first_row else None
            )
            for low in range(begin, begin + count, self.block_rows):
                block = slice(low, min(low + self.block_rows, begin + count))
                x_bD = rows.x_TD[rows.tokens_N[block]].to(self._dtype)
                in_bK = F.linear(x_bD, in_nKD[i, :, :D], _cast(bias_K, x_bD))
                v_bD = F.linear(self._hidden(in_bK), down_nDF[i, :D, :f16], _cast(bias_D, x_bD))
                if wave.first_row:
                    rows.v_ND[block] += v_bD
                else:
                    rows.v_ND[block] = v_bD

    def _hidden(self, in_bK: Tensor) -> Tensor:
        """h_bF = act(gate, up), in fp32, rounded to in_bK's type."""
        if self._kernels is not None:
            return self._kernels.hidden(self.spec, in_bK)
        if self.spec.gated:
            gate_bF, up_bF = in_bK.float().chunk(2, 1)
            return activate(self.spec.activation, gate_bF, up_bF).to(in_bK.dtype)
        return activate(self.spec.activation, in_bK.float(), None).to(in_bK.dtype)


def combine(v_ND: Tensor, position_TK: Tensor, weights_TK: Tensor, y_TD: Tensor | None) -> Tensor:
    """fp32 y_TD + sum over k, in order, of weight_Tk * v[position_Tk]; positions from N on add nothing.

    v_ND has one row more than N, of zeros. In this order, so that the sum does not depend on who is where.
    """
    num_rows = len(v_ND) - 1
    here_TK = position_TK < num_rows
    weights_TK = torch.where(here_TK, weights_TK.float(), 0.0)
    position_TK = torch.where(here_TK, position_TK, num_rows)
    sum_TD = torch.zeros(len(position_TK), v_ND.shape[1], device=v_ND.device) if y_TD is None else y_TD
    for k in range(position_TK.shape[1]):
        sum_TD = torch.addcmul(sum_TD, v_ND[position_TK[:, k]].float(), weights_TK[:, k, None])
    return sum_TD


def _in_bias(biases: Mapping[str, Tensor], row: int, of_f: slice) -> Tensor | None:
    parts = [biases[role][row, of_f] for role in ("gate_bias", "up_bias") if role in biases]
    return torch.cat(parts) if parts else None


def _cast(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)
