"""prefill.cu and panels.cu as calls over tensors; compiled for the current device at first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hostcompute import ExpertLayout, ExpertSpec
from hostcompute.layout import LANES
from monde.device.kernels import ACTIVATION_CODES, MAX_EXPERTS, compile_options
from monde.device.record import Record
from monde.device.streams import current_stream

SOURCES = ("elements.cuh", "product.cuh", "activation.cuh", "prefill.cu", "panels.cu")  # joined in this order
_THREADS = 256  # kThreads of elements.cuh
_LINES = 64  # kLines of prefill.cu
_MAX_BLOCKS = 4096
_SORT_THREADS = 1024  # kSortThreads of prefill.cu
TILE_ROWS = 128  # kTileRows of panels.cu
_PANEL_WARPS = 4  # kPanelWarps
_PANEL_SHARED_BYTES = 6 * (TILE_ROWS * 64 + _PANEL_WARPS * 2048)  # kStages times Stage
_LAYER = "struct Layer { int activation, gated; double limit, alpha; };\n"
_PIECE = Record(  # what panels.cu knows of a wave's pieces
    "PieceLayout",
    """in_offset_bytes in_panel_bytes down_offset_bytes down_panel_bytes num_f_panels num_d_panels
    d_model d_pad_k f_pad_k first_row up_bias_stride down_bias_stride activation gated""".split(),  # noqa: SIM905
    ("limit", "alpha"),
)


class Tiles(NamedTuple):
    """A wave's blocks of rows, on the device: num_tiles times int64 (bytes into what holds the pieces, first row of N,
    rows, row of the biases), see waves.tiles_of."""

    address: int
    num_tiles: int


@dataclass(frozen=True)
class PieceRecord:
    """Pieces of one layout that begin at one row of F, for the kernels that read panels. Grids: blocks of a tile."""

    record: npt.NDArray[np.void]
    first_row: int
    in_blocks: int
    down_blocks: int

    @classmethod
    def of(
        cls,
        spec: ExpertSpec,
        layout: ExpertLayout,
        at: Any,  # monde.executors.pieces.PackedAt
        first_row: int,
        bias_sizes: Mapping[str, int],
    ) -> PieceRecord:
        """bias_sizes: rows of a whole expert's biases, with their padding."""
        activation = spec.activation
        record = _PIECE.of(
            {
                "in_offset_bytes": at.in_offset_bytes,
                "in_panel_bytes": layout.in_panel_bytes,
                "down_offset_bytes": at.down_offset_bytes,
                "down_panel_bytes": at.down_panel_bytes,
                "num_f_panels": layout.num_f_panels,
                "num_d_panels": layout.num_d_panels,
                "d_model": spec.d_model,
                "d_pad_k": layout.d_pad_k,
                "f_pad_k": layout.f_pad_k,
                "first_row": first_row,
                "up_bias_stride": bias_sizes.get("up_bias", 0),
                "down_bias_stride": bias_sizes.get("down_bias", 0),
                "activation": ACTIVATION_CODES[activation.kind],
                "gated": int(spec.gated),
                "limit": activation.limit,
                "alpha": activation.alpha,
            }
        )
        num_units = layout.num_f_panels if spec.gated else -(-layout.num_f_panels // 2)
        num_pairs = -(-layout.num_d_panels // 2)
        return cls(record, first_row, -(-num_units // _PANEL_WARPS), -(-num_pairs // _PANEL_WARPS))


def prefill_source() -> str:
    kinds = [f"constexpr int KIND_{kind.name} = {code};" for kind, code in ACTIVATION_CODES.items()]
    parts = (Path(__file__).with_name(name).read_text() for name in SOURCES)
    constants = f"constexpr int MAX_EXPERTS = {MAX_EXPERTS};"
    return "\n".join((constants, *kinds, _LAYER, _PIECE.c_struct(), *parts))


@cache
def _functions(device: torch.device, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> dict[str, Any]:
    import cupy

    module = cupy.RawModule(code=prefill_source(), options=compile_options(x_dtype, weight_dtype))
    functions = {
        name: module.get_function(name)
        for name in ("unpack", "hidden", "combine", "count", "lay_out", "place")
    }
    if x_dtype is weight_dtype is torch.bfloat16:
        for name in ("panels_in", "panels_down"):
            functions[name] = module.get_function(name)
            with torch.cuda.device(device):  # the attribute is one of a device
                functions[name].max_dynamic_shared_size_bytes = _PANEL_SHARED_BYTES
    return functions


class PrefillKernels:
    """For activations of x_dtype, multiplied as the wider of the two types. upload: Lanes.upload.

    Errors: ImportError without CuPy.
    """

    def __init__(
        self,
        x_dtype: torch.dtype,
        weight_dtype: torch.dtype,
        device: torch.device,
        upload: Callable[[npt.NDArray[Any]], Tensor],
    ) -> None:
        product_dtype = torch.promote_types(x_dtype, weight_dtype)
        self.device, self._upload = device, upload
        self._unpack = _functions(device, product_dtype, weight_dtype)["unpack"]
        self._hidden = _functions(device, product_dtype, weight_dtype)["hidden"]
        self._of_x = _functions(device, x_dtype, weight_dtype)
        self._combine = self._of_x["combine"]
        self._x_dtype = x_dtype
        self.has_panels = "panels_in" in self._of_x and torch.cuda.get_device_capability(device) >= (8, 0)

    # ---- pairs ----
    def count(self, ids_TK: Tensor, weights_TK: Tensor, counts_E: Tensor) -> Tensor:
        """int64 known ids, E for a pair that counts for nothing; pairs per expert into counts_E, int64, pinned or not."""
        known_TK, num_experts = torch.empty_like(ids_TK), len(counts_E)
        assert num_experts <= MAX_EXPERTS, num_experts
        with current_stream(self.device):
            self._of_x["count"](
                (1,),
                (_SORT_THREADS,),
                (
                    ids_TK.data_ptr(),
                    weights_TK.data_ptr(),
                    known_TK.data_ptr(),
                    counts_E.data_ptr(),
                    np.int32(ids_TK.numel()),
                    np.int32(num_experts),
                ),
            )
        return known_TK

    def lay_out(
        self, counts_E: Tensor, slot_of_expert_E: Tensor, slot_bytes: int, num_pairs_1: Tensor, max_pairs: int
    ) -> tuple[Tensor, Tensor]:
        """begin_E and tiles [max_tiles, 4] of a layer whose experts all have slots; the pairs are added to num_pairs_1.

        counts_E on the device, of max_pairs at most. slot_of_expert_E: int32.
        """
        num_experts = len(counts_E)
        max_tiles = max_pairs // TILE_ROWS + min(num_experts, max_pairs)
        begin_E, tiles_4 = counts_E.new_empty(num_experts), counts_E.new_empty(max_tiles, 4)
        with current_stream(self.device):
            self._of_x["lay_out"](
                (1,),
                (_SORT_THREADS,),
                (
                    counts_E.data_ptr(),
                    slot_of_expert_E.data_ptr(),
                    np.int64(slot_bytes),
                    begin_E.data_ptr(),
                    tiles_4.data_ptr(),
                    num_pairs_1.data_ptr(),
                    np.int32(max_tiles),
                    np.int32(TILE_ROWS),
                    np.int32(num_experts),
                ),
            )
        return begin_E, tiles_4

    def place(self, known_TK: Tensor, begin_E: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """position_TK, num_rows for pairs that others compute, and tokens_N; begin_E is -1 for those."""
        position_TK, tokens_N = torch.empty_like(known_TK), known_TK.new_empty(num_rows)
        with current_stream(self.device):
            self._of_x["place"](
                (1,),
                (_SORT_THREADS,),
                (
                    known_TK.data_ptr(),
                    begin_E.data_ptr(),
                    position_TK.data_ptr(),
                    tokens_N.data_ptr(),
                    np.int64(num_rows),
                    np.int32(known_TK.numel()),
                    np.int32(known_TK.shape[1]),
                    np.int32(len(begin_E)),
                ),
            )
        return position_TK, tokens_N

    # ---- products from panels ----
    def panels(
        self,
        pieces: PieceRecord,
        tiles: Tiles,
        blobs_B: Tensor,
        biases: Mapping[str, Tensor],
        x_TD: Tensor,
        tokens_N: Tensor,
        h_NF: Tensor,
        v_ND: Tensor,
    ) -> None:
        """v_ND of a wave; added to where its pieces do not begin their experts. Needs has_panels."""
        block, shared = (32 * _PANEL_WARPS,), _PANEL_SHARED_BYTES
        bias = {role: tensor.data_ptr() for role, tensor in biases.items()}
        down_bias = 0 if pieces.first_row else bias.get("down_bias", 0)
        blobs, h = blobs_B.data_ptr(), h_NF.data_ptr()
        into_h = (x_TD.data_ptr(), tokens_N.data_ptr(), h, bias.get("gate_bias", 0), bias.get("up_bias", 0))
        into_v = (h, v_ND.data_ptr(), down_bias, np.int32(v_ND.dtype is torch.float32))
        with current_stream(self.device):
            self._of_x["panels_in"](
                (tiles.num_tiles, pieces.in_blocks),
                block,
                (pieces.record, blobs, tiles.address, *into_h),
                shared_mem=shared,
            )
            self._of_x["panels_down"](
                (tiles.num_tiles, pieces.down_blocks),
                block,
                (pieces.record, blobs, tiles.address, *into_v),
                shared_mem=shared,
            )

    # ---- around the libraries' products ----

    def unpack(
        self,
        spec: ExpertSpec,
        layout: ExpertLayout,
        blobs_B: Tensor,
        offsets_bytes: npt.NDArray[np.int64],
        at: Any,  # monde.executors.pieces.PackedAt
        in_nKD: Tensor,
        down_nDF: Tensor,
    ) -> None:
        """Products.unpack on the device: one launch for gate and up of all pieces, one for down."""
        offsets_n = self._upload(offsets_bytes)
        roles = 2 if spec.gated else 1
        n, f16 = len(offsets_bytes), layout.num_f_panels * LANES
        parts = (
            (at.in_offset_bytes, layout.in_panel_bytes, roles, layout.d_pad_k, f16, in_nKD),
            (
                at.down_offset_bytes,
                at.down_panel_bytes,
                1,
                layout.f_pad_k,
                layout.num_d_panels * LANES,
                down_nDF,
            ),
        )
        with current_stream(self.device):
            for first, stride, num_roles, k_pad, rows_per_role, out in parts:
                lines = k_pad // layout.k_group
                num_panels = num_roles * rows_per_role // LANES
                self._unpack(
                    (-(-lines // _LINES), num_panels, n),
                    (_THREADS,),
                    (
                        blobs_B.data_ptr(),
                        offsets_n.data_ptr(),
                        np.int64(first),
                        np.int64(stride),
                        np.int32(num_roles),
                        np.int32(lines),
                        np.int32(rows_per_role),
                        out.data_ptr(),
                        np.int64(out[0].numel() // layout.k_group),
                    ),
                )

    def hidden(self, spec: ExpertSpec, in_bK: Tensor) -> Tensor:
        """h_bF of in_bK, contiguous."""
        num_rows, width = in_bK.shape
        d_ffn = width // 2 if spec.gated else width
        h_bF = in_bK.new_empty(num_rows, d_ffn)
        activation = spec.activation
        with current_stream(self.device):
            self._hidden(
                (max(1, min(_MAX_BLOCKS, -(-num_rows * d_ffn // (4 * _THREADS)))),),
                (_THREADS,),
                (
                    in_bK.data_ptr(),
                    h_bF.data_ptr(),
                    np.int64(num_rows),
                    np.int32(d_ffn),
                    np.int32(ACTIVATION_CODES[activation.kind]),
                    np.int32(spec.gated),
                    np.float64(activation.limit),
                    np.float64(activation.alpha),
                ),
            )
        return h_bF

    def combine(
        self, v_ND: Tensor, position_TK: Tensor, weights_TK: Tensor, host_TD: Tensor | None
    ) -> Tensor:
        """y_TD of x's type. v_ND without a row of zeros; weights_TK fp32; host_TD pinned; all contiguous."""
        num_tokens, num_topk = position_TK.shape
        d_model = v_ND.shape[1]
        y_TD = torch.empty(num_tokens, d_model, dtype=self._x_dtype, device=self.device)
        with current_stream(self.device):
            self._combine(
                (-(-d_model // (8 * _THREADS)), num_tokens),
                (_THREADS,),
                (
                    v_ND.data_ptr(),
                    np.int32(v_ND.dtype is torch.float32 and self._x_dtype is not torch.float32),
                    position_TK.data_ptr(),
                    weights_TK.data_ptr(),
                    0 if host_TD is None else host_TD.data_ptr(),
                    y_TD.data_ptr(),
                    np.int64(len(v_ND)),
                    np.int32(d_model),
                    np.int32(num_topk),
                ),
            )
        return y_TD
