"""Experts in pieces along F: what one staging buffer holds, and where a piece lies in a packed expert.

A piece of rows [first_row, first_row + num_rows) of F, both multiples of 32 but for the end of F, packed by itself
is the blob of a smaller expert: its units of gate and up are contiguous in the whole one, and of every down panel it
is one run. So staging, unpacking and products know blobs of some F and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from hostcompute import ExpertLayout, ExpertSpec, make_layout
from hostcompute.layout import LANES, PAD_K


@dataclass(frozen=True)
class PackedAt:
    """Where a piece lies, in bytes from the beginning of what holds it: a whole expert, or the piece alone."""

    in_offset_bytes: int
    down_offset_bytes: int
    down_panel_bytes: int  # from one down panel to the next


def piece_spec(spec: ExpertSpec, num_rows: int) -> ExpertSpec:
    return replace(spec, d_ffn=num_rows)


@lru_cache(maxsize=1024)
def piece_layout(spec: ExpertSpec, num_rows: int) -> ExpertLayout:
    return make_layout(piece_spec(spec, num_rows))


def in_whole(spec: ExpertSpec, first_row: int) -> PackedAt:
    """A piece inside its expert's blob."""
    assert first_row % PAD_K == 0, first_row
    layout = make_layout(spec)
    return PackedAt(
        first_row // LANES * layout.in_unit_bytes,
        layout.down_offset_bytes + first_row * LANES * spec.dtype.itemsize_bytes,
        layout.down_panel_bytes,
    )


def alone(spec: ExpertSpec, num_rows: int) -> PackedAt:
    layout = piece_layout(spec, num_rows)
    return PackedAt(0, layout.down_offset_bytes, layout.down_panel_bytes)


def rows_per_piece(spec: ExpertSpec, max_bytes: int) -> int:
    """Rows of F so that a piece has at most `max_bytes`, where 32 rows do: F where a whole expert fits."""
    layout = make_layout(spec)
    if layout.weight_bytes <= max_bytes:
        return spec.d_ffn
    bytes_per_row = layout.in_unit_bytes // LANES + layout.num_d_panels * LANES * spec.dtype.itemsize_bytes
    num_pieces = -(-spec.d_ffn // max(PAD_K, max_bytes // bytes_per_row // PAD_K * PAD_K))
    return -(-spec.d_ffn // (num_pieces * PAD_K)) * PAD_K  # about equal ones
