"""prefill.cu and panels.cu as calls over tensors; compiled for the current device at first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hostcompute import ExpertLayout, ExpertSpec
from hostcompute.layout import LANES
from monde.device.kernels import ACTIVATION_CODES, MAX_EXPERTS, activation_source, compile_options
from monde.device.kernels.panels import MMA, Kind, Panels, PieceRecord, Tiles, form_of
from monde.device.streams import current_stream

_THREADS = 256  # kThreads of elements.cuh
_LINES = 64  # kLines of prefill.cu
_MAX_BLOCKS = 4096
_SORT_THREADS = 1024  # kSortThreads of prefill.cu


def prefill_source() -> str:
    code = Path(__file__).with_name("prefill.cu").read_text()
    return "\n".join((f"constexpr int MAX_EXPERTS = {MAX_EXPERTS};", activation_source(), code))


@cache
def _functions(device: torch.device, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> dict[str, Any]:
    import cupy

    module = cupy.RawModule(code=prefill_source(), options=compile_options(x_dtype, weight_dtype))
    names = ("unpack", "hidden", "combine", "count", "lay_out", "place")
    return {name: module.get_function(name) for name in names}


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
        form = form_of(device) if x_dtype is weight_dtype is torch.bfloat16 else None
        self._panels = None if form is None else Panels(device, form)
        self.tile_rows = MMA.tile_rows if form is None else form.tile_rows

    @property
    def has_panels(self) -> bool:
        return self._panels is not None

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
        max_tiles = max_pairs // self.tile_rows + min(num_experts, max_pairs)
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
                    np.int32(self.tile_rows),
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
    def build_panels(self, kind: Kind) -> None:
        """What `panels` needs for such experts; seconds at the first use on a machine. Needs has_panels."""
        assert self._panels is not None
        self._panels.build(kind)

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
        assert self._panels is not None
        bias = {role: tensor.data_ptr() for role, tensor in biases.items()}
        down_bias = 0 if pieces.first_row else bias.get("down_bias", 0)
        h = h_NF.data_ptr()
        into_h = (x_TD.data_ptr(), tokens_N.data_ptr(), h, bias.get("gate_bias", 0), bias.get("up_bias", 0))
        into_v = (h, v_ND.data_ptr(), down_bias, np.int32(v_ND.dtype is torch.float32))
        with current_stream(self.device):
            self._panels.launch(pieces, tiles, blobs_B.data_ptr(), into_h, into_v)

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
