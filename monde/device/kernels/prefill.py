"""prefill.cu as calls over tensors; compiled for the current device at first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hostcompute import ExpertLayout, ExpertSpec
from hostcompute.layout import LANES
from monde.device.kernels import ACTIVATION_CODES, compile_options
from monde.device.streams import current_stream

SOURCES = ("elements.cuh", "activation.cuh", "prefill.cu")  # joined in this order
_THREADS = 256  # kThreads of elements.cuh
_LINES = 64  # kLines of prefill.cu
_MAX_BLOCKS = 4096
_LAYER = "struct Layer { int activation, gated; double limit, alpha; };\n"


def prefill_source() -> str:
    kinds = [f"constexpr int KIND_{kind.name} = {code};" for kind, code in ACTIVATION_CODES.items()]
    parts = (Path(__file__).with_name(name).read_text() for name in SOURCES)
    return "\n".join((*kinds, _LAYER, *parts))


@cache
def _functions(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> dict[str, Any]:
    import cupy

    module = cupy.RawModule(code=prefill_source(), options=compile_options(x_dtype, weight_dtype))
    return {name: module.get_function(name) for name in ("unpack", "hidden", "combine")}


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
        self._unpack = _functions(product_dtype, weight_dtype)["unpack"]
        self._hidden = _functions(product_dtype, weight_dtype)["hidden"]
        self._combine = _functions(x_dtype, weight_dtype)["combine"]
        self._x_dtype = x_dtype

    def unpack(
        self,
        spec: ExpertSpec,
        layout: ExpertLayout,
        blobs_B: Tensor,
        offsets_bytes: Sequence[int],
        at: Any,  # monde.executors.pieces.PackedAt
        in_nKD: Tensor,
        down_nDF: Tensor,
    ) -> None:
        """Products.unpack on the device: one launch for gate and up of all pieces, one for down."""
        offsets_n = self._upload(np.asarray(offsets_bytes, np.int64))
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
                (-(-d_model // _THREADS), num_tokens),
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
