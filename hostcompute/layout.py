"""How one expert's weights lie in memory: the agreement between packer, host kernels and GPU kernels.

native/layout.h explains the panels and computes the same numbers in C++; a test holds the two equal.
Letters: D model dim, F expert hidden dim, K inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from hostcompute.spec import DType, ExpertSpec

LANES = 16  # output rows of a panel
PAD_K = 32  # inputs are padded to this
BLOB_ALIGN_BYTES = 4096  # experts begin at pages


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes of one expert's panels, padding included; `in` panels hold gate and up, `down` panels the rest."""

    d_pad_k: int
    f_pad_k: int
    num_f_panels: int
    num_d_panels: int
    k_group: int
    in_panel_bytes: int
    in_unit_bytes: int  # gate and up panel of the same rows; ungated: one panel
    down_panel_bytes: int
    down_offset_bytes: int
    weight_bytes: int

    @property
    def blob_bytes(self) -> int:
        """From one expert to the next where several lie in a row."""
        return _round_up(self.weight_bytes, BLOB_ALIGN_BYTES)


def make_layout(spec: ExpertSpec) -> ExpertLayout:
    d_pad_k, f_pad_k = _round_up(spec.d_model, PAD_K), _round_up(spec.d_ffn, PAD_K)
    num_f_panels, num_d_panels = -(-spec.d_ffn // LANES), -(-spec.d_model // LANES)
    line_bytes = LANES * spec.dtype.itemsize_bytes
    in_panel_bytes, down_panel_bytes = d_pad_k * line_bytes, f_pad_k * line_bytes
    in_unit_bytes = in_panel_bytes * (2 if spec.gated else 1)
    down_offset_bytes = in_unit_bytes * num_f_panels
    return ExpertLayout(
        d_pad_k,
        f_pad_k,
        num_f_panels,
        num_d_panels,
        2 if spec.dtype is DType.BF16 else 1,
        in_panel_bytes,
        in_unit_bytes,
        down_panel_bytes,
        down_offset_bytes,
        down_offset_bytes + down_panel_bytes * num_d_panels,
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
