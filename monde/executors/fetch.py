"""Experts from pinned host memory into staging on the device, over the lane of weights.

The buffers are filled in turn. A buffer is filled anew only after what reads it has been launched, and on the device
only after it has run; nobody on the CPU waits for either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hostcompute import ExpertSpec, make_layout
from monde.device.lanes import Lane, Lanes, Mark
from monde.executors.pieces import alone, in_whole, piece_layout
from monde.planning.staging import Piece
from monde.weights.host import HostBlobs


@dataclass
class Shipment:
    """Pieces of one size on their way into a buffer of `ring`, piece i from i * stride_bytes on."""

    pieces: tuple[Piece, ...]
    buffer_B: Tensor
    stride_bytes: int
    left: Mark
    arrived: Mark
    buffer_idx: int
    num_bytes: int


class StagingRing:
    """Buffers on the device that all layers of a model share."""

    def __init__(self, lanes: Lanes, num_buffers: int, buffer_bytes: int) -> None:
        self.lanes, self.num_buffers = lanes, num_buffers
        self._buffers_BB = torch.empty(num_buffers, buffer_bytes, dtype=torch.uint8, device=lanes.device)
        self._free: list[Mark | None] = [lanes.main.mark()] * num_buffers
        self._next = 0

    @property
    def has_room(self) -> bool:
        """Whether the next buffer's readers have been launched."""
        return self._free[self._next] is not None

    def fetch(self, blobs: HostBlobs, pieces: tuple[Piece, ...], after: Mark | None = None) -> Shipment:
        """Start copying, after a mark if one is given; `release` it when all that reads it is launched.

        Needs `has_room`.
        """
        idx, free = self._next, self._free[self._next]
        assert free is not None
        self._free[idx], self._next = None, (idx + 1) % self.num_buffers
        spec = blobs.spec
        layout = piece_layout(spec, pieces[0].num_rows)
        buffer_B, stride_bytes = self._buffers_BB[idx], layout.blob_bytes
        assert len(pieces) * stride_bytes <= len(buffer_B), (len(pieces), stride_bytes)
        lane, address = self.lanes.weights, buffer_B.data_ptr()
        lane.after(free)
        if after is not None:
            lane.after(after)
        left = lane.mark(timed=True)
        if pieces[0].num_rows == spec.d_ffn:
            _copy_whole(lane, blobs, pieces, address, stride_bytes)
        else:
            for i, piece in enumerate(pieces):
                _copy_part(lane, blobs, piece, address + i * stride_bytes)
        arrived = lane.mark(timed=True)
        return Shipment(pieces, buffer_B, stride_bytes, left, arrived, idx, len(pieces) * layout.weight_bytes)

    def release(self, shipment: Shipment) -> None:
        """All that reads the buffer has been launched."""
        self._free[shipment.buffer_idx] = self.lanes.main.mark()

    def release_all(self) -> None:
        self._free = [self.lanes.main.mark()] * self.num_buffers


def _copy_part(lane: Lane, blobs: HostBlobs, piece: Piece, target: int) -> None:
    spec: ExpertSpec = blobs.spec
    blob, _ = blobs.run(blobs.place_of(piece.expert_id), 1)
    part, whole = piece_layout(spec, piece.num_rows), make_layout(spec)
    there, here = in_whole(spec, piece.first_row), alone(spec, piece.num_rows)
    lane.copy(target, blob + there.in_offset_bytes, part.num_f_panels * part.in_unit_bytes)
    lane.copy_rows(
        (target + here.down_offset_bytes, part.down_panel_bytes),
        (blob + there.down_offset_bytes, whole.down_panel_bytes),
        part.down_panel_bytes,
        part.num_d_panels,
    )


def _copy_whole(
    lane: Lane, blobs: HostBlobs, pieces: Sequence[Piece], target: int, stride_bytes: int
) -> None:
    """Experts that follow one another in host memory in one copy, as far as the memory was pinned in one."""
    places = [blobs.place_of(piece.expert_id) for piece in pieces]
    runs = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(places)) if b != a + 1), len(pieces)]
    for begin, end in pairwise(runs):
        source, num_bytes = blobs.run(places[begin], end - begin)
        lane.copy(target + begin * stride_bytes, source, num_bytes)
