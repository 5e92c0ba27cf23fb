"""One expert between row-major matrices and the panels of hostcompute.layout, in torch, on any device.

The bytes are those of native/runtime/pack.cpp, so that host memory, GPU slots and copies between them hold the
same blob. Letters: N output rows, K inputs, P panels, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hostcompute import DType, ExpertSpec, make_layout
from hostcompute.layout import LANES

TORCH_DTYPES = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16}


def pack(spec: ExpertSpec, arrays: Mapping[str, Tensor], blob_B: Tensor) -> None:
    """Write gate_FD, up_FD, down_DF (keywords of ExpertBank.load) into `blob_B`, uint8 [layout.weight_bytes]."""
    for role, panels in _panel_views(spec, blob_B).items():
        num_panels, num_groups, _, k_group = panels.shape
        matrix_NK = arrays[role].to(device=blob_B.device, dtype=panels.dtype)
        padded = F.pad(
            matrix_NK,
            (0, num_groups * k_group - matrix_NK.shape[1], 0, num_panels * LANES - matrix_NK.shape[0]),
        )
        panels.copy_(padded.view(num_panels, LANES, num_groups, k_group).transpose(1, 2))


def unpack(spec: ExpertSpec, blob_B: Tensor) -> dict[str, Tensor]:
    """Row-major copies of the matrices in a blob."""
    shapes = {
        "gate": (spec.d_ffn, spec.d_model),
        "up": (spec.d_ffn, spec.d_model),
        "down": (spec.d_model, spec.d_ffn),
    }
    matrices = {}
    for role, panels in _panel_views(spec, blob_B).items():
        num_panels, num_groups, _, k_group = panels.shape
        padded = panels.transpose(1, 2).reshape(num_panels * LANES, num_groups * k_group)
        num_rows, num_columns = shapes[role]
        matrices[role] = padded[:num_rows, :num_columns]
    return matrices


def _panel_views(spec: ExpertSpec, blob_B: Tensor) -> dict[str, Tensor]:
    """[P, G, 16, k_group] views of the blob, by role."""
    layout, dtype = make_layout(spec), TORCH_DTYPES[spec.dtype]
    ins = blob_B[: layout.down_offset_bytes].view(dtype)
    downs = blob_B[layout.down_offset_bytes : layout.weight_bytes].view(dtype)
    units = ins.view(
        layout.num_f_panels,
        2 if spec.gated else 1,
        layout.d_pad_k // layout.k_group,
        LANES,
        layout.k_group,
    )
    views = {"gate": units[:, 0], "up": units[:, 1]} if spec.gated else {"up": units[:, 0]}
    views["down"] = downs.view(layout.num_d_panels, layout.f_pad_k // layout.k_group, LANES, layout.k_group)
    return views
