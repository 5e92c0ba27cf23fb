"""Many tokens by many experts on the device: unpack some experts, multiply, combine. Decides nothing.

Weights lie packed, in slots and in staging. Unpacking 9.4 MB takes 6 us at 3 TB/s, fetching them over the bus 171 us
and their product with 128 tokens 3 us: row-major scratch and the libraries' products cost a twentieth of what bounds
a prompt whose experts travel. A product that reads panels would save it where all experts are resident.

Letters: n pieces of experts, R routed pairs in the order of their experts, N = R of the device, D model dim, F rows
of a piece, padded to 16 (F16) or 32; P panels, U matrices of a unit (gate and up, or up).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hostcompute import ExpertSpec, make_layout
from hostcompute.layout import LANES
from monde.device.kernels.prefill import PrefillKernels
from monde.executors.activations import activate
from monde.executors.pieces import PackedAt, Piece, piece_layout
from monde.weights.packing import TORCH_DTYPES


@dataclass(frozen=True)
class Wave:
    """Pieces of one size that are computed together, their rows one after the other from row_begin on.

    blobs_B holds all of them, piece i from offsets_bytes[i] on; at says where its parts lie from there.
    biases: by role, [n, size], of the whole experts.
    """

    pieces: Sequence[Piece]
    blobs_B: Tensor
    offsets_bytes: Sequence[int]
    at: PackedAt
    biases: Mapping[str, Tensor]
    row_begin: int
    counts: Sequence[int]

    @property
    def num_rows(self) -> int:
        return sum(self.counts)


class Products:
    """Of one layer. scratch_B: uint8, shared by the layers of a model; one stream uses it at a time."""

    def __init__(
        self, spec: ExpertSpec, scratch_B: Tensor, kernels: PrefillKernels | None, block_rows: int
    ) -> None:
        self.spec, self.block_rows = spec, block_rows
        self._scratch_B, self._kernels = scratch_B, kernels
        self._w_dtype = TORCH_DTYPES[spec.dtype]
        self._num_in = 2 if spec.gated else 1
        device = scratch_B.device
        # CUTLASS' grouped product; elsewhere torch's loops over groups that it reads back from the device.
        self._has_grouped = (
            device.type == "cuda"
            and torch.cuda.get_device_capability(device)[0] in (9, 10)
            and spec.d_model % 32 == 0
            and spec.d_ffn % 32 == 0
        )

    # ---- one wave ----
    def unpack(self, wave: Wave) -> tuple[Tensor, Tensor]:
        """in_nUFD [n, U * F16, Dpad] and down_nDF [n, D16, Fpad], in scratch; then the blobs may change."""
        layout = piece_layout(self.spec, wave.pieces[0].num_rows)
        n, in_rows = len(wave.pieces), self._num_in * layout.num_f_panels * LANES
        in_shape, down_shape = (n, in_rows, layout.d_pad_k), (n, layout.num_d_panels * LANES, layout.f_pad_k)
        num_in, num_down = n * in_shape[1] * in_shape[2], n * down_shape[1] * down_shape[2]
        values = self._scratch_B.view(self._w_dtype)
        in_nKD = values[:num_in].view(in_shape)
        down_nDF = values[num_in : num_in + num_down].view(down_shape)
        if self._kernels is not None:
            self._kernels.unpack(
                self.spec, layout, wave.blobs_B, wave.offsets_bytes, wave.at, in_nKD, down_nDF
            )
        else:
            for i, offset_bytes in enumerate(wave.offsets_bytes):
                self._unpack_one(wave, offset_bytes, in_nKD[i], down_nDF[i])
        return in_nKD, down_nDF

    def _unpack_one(self, wave: Wave, offset_bytes: int, in_KD: Tensor, down_DF: Tensor) -> None:
        whole, layout = make_layout(self.spec), piece_layout(self.spec, wave.pieces[0].num_rows)
        U, P, k_group, item = (
            self._num_in,
            layout.num_f_panels,
            layout.k_group,
            self.spec.dtype.itemsize_bytes,
        )
        line = LANES * k_group
        values = wave.blobs_B.view(self._w_dtype)
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

    def multiply(
        self,
        wave: Wave,
        weights: tuple[Tensor, Tensor],
        x_TD: Tensor,
        tokens_N: Tensor,
        v_ND: Tensor,
        ends_bn: Tensor | None,
    ) -> None:
        """v_ND of the wave's rows; added to where a piece does not begin its expert.

        ends_bn: for every block of block_rows rows the ends of the n groups in it, int32; see `ends_of`.
        """
        in_nKD, down_nDF = weights
        dtype = torch.promote_types(x_TD.dtype, self._w_dtype)
        in_nKD, down_nDF = in_nKD.to(dtype), down_nDF.to(dtype)
        end = wave.row_begin + wave.num_rows
        for b, row in enumerate(range(wave.row_begin, end, self.block_rows)):
            rows = slice(row, min(row + self.block_rows, end))
            x_bD = x_TD[tokens_N[rows]].to(dtype)
            if ends_bn is not None:
                self._grouped(in_nKD, down_nDF, x_bD, v_ND[rows], ends_bn[b])
            else:
                self._one_by_one(wave, in_nKD, down_nDF, x_bD, v_ND, rows)

    def takes_grouped(self, x_dtype: torch.dtype, wave: Wave) -> bool:
        whole = wave.pieces[0].first_row == 0 and wave.pieces[0].num_rows == self.spec.d_ffn
        return self._has_grouped and whole and not wave.biases and x_dtype is self._w_dtype is torch.bfloat16

    def _grouped(self, in_nKD: Tensor, down_nDF: Tensor, x_bD: Tensor, v_bD: Tensor, ends_n: Tensor) -> None:
        in_bK = F.grouped_mm(x_bD, in_nKD.transpose(1, 2), offs=ends_n)
        v_bD.copy_(F.grouped_mm(self._hidden(in_bK), down_nDF.transpose(1, 2), offs=ends_n))

    def _one_by_one(
        self, wave: Wave, in_nKD: Tensor, down_nDF: Tensor, x_bD: Tensor, v_ND: Tensor, rows: slice
    ) -> None:
        begin, D = wave.row_begin, self.spec.d_model
        for i, (piece, count) in enumerate(zip(wave.pieces, wave.counts, strict=True)):
            low, high = max(begin, rows.start), min(begin + count, rows.stop)
            begin += count
            if low >= high:
                continue
            f16 = in_nKD.shape[1] // self._num_in
            bias_K = _in_bias(wave.biases, i, piece, f16)
            in_bK = F.linear(
                x_bD[low - rows.start : high - rows.start], in_nKD[i, :, :D], _cast(bias_K, x_bD)
            )
            bias_D = (
                wave.biases["down_bias"][i, :D]
                if "down_bias" in wave.biases and not piece.first_row
                else None
            )
            v_bD = F.linear(self._hidden(in_bK), down_nDF[i, :D, :f16], _cast(bias_D, x_bD))
            if piece.first_row:
                v_ND[low:high] += v_bD
            else:
                v_ND[low:high] = v_bD

    def _hidden(self, in_bK: Tensor) -> Tensor:
        """h_bF = act(gate, up), in fp32, rounded to in_bK's type."""
        if self._kernels is not None:
            return self._kernels.hidden(self.spec, in_bK)
        if self.spec.gated:
            gate_bF, up_bF = in_bK.float().chunk(2, 1)
            return activate(self.spec.activation, gate_bF, up_bF).to(in_bK.dtype)
        return activate(self.spec.activation, in_bK.float(), None).to(in_bK.dtype)


def ends_of(wave: Wave, block_rows: int) -> list[list[int]]:
    """Where the groups end, counted from the beginning of each block of rows, within it."""
    ends, end = [], 0
    for count in wave.counts:
        end += count
        ends.append(end)
    return [
        [max(0, min(end - row, block_rows, wave.num_rows - row)) for end in ends]
        for row in range(0, wave.num_rows, block_rows)
    ]


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


def _in_bias(biases: Mapping[str, Tensor], i: int, piece: Piece, f16: int) -> Tensor | None:
    rows = slice(piece.first_row, piece.first_row + f16)
    parts = [biases[role][i, rows] for role in ("gate_bias", "up_bias") if role in biases]
    return torch.cat(parts) if parts else None


def _cast(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)
