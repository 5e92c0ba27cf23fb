"""How experts travel to the device: whole or in pieces along F, so many to a buffer, the buffers filled in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Piece(NamedTuple):
    """Rows [first_row, first_row + num_rows) of F of one expert."""

    expert_id: int
    first_row: int
    num_rows: int


def pieces_of(expert_id: int, num_rows: int, rows_per_piece: int) -> list[Piece]:
    """The first `num_rows` rows of F of an expert, cut."""
    return [
        Piece(expert_id, row, min(rows_per_piece, num_rows - row))
        for row in range(0, num_rows, rows_per_piece)
    ]


@dataclass(frozen=True)
class Staging:
    """A piece has at most piece_rows rows of F, a buffer num_pieces pieces of one size."""

    piece_rows: int
    num_pieces: int
    num_buffers: int

    @classmethod
    def one_by_one(cls, d_ffn: int, num_experts: int) -> Staging:
        """Room for every expert by itself: nothing waits for a buffer."""
        return cls(d_ffn, 1, num_experts + 1)

    def loads(self, experts: Sequence[int], d_ffn: int) -> list[tuple[Piece, ...]]:
        """Experts, the first ones first, by buffer. Whole ones lie in a buffer as in host memory, for neighbours there
        travel in one copy; larger ones come piece after piece.
        """
        if self.piece_rows < d_ffn:
            return [(piece,) for e in experts for piece in pieces_of(e, d_ffn, self.piece_rows)]
        return [
            tuple(Piece(e, 0, d_ffn) for e in sorted(experts[i : i + self.num_pieces]))
            for i in range(0, len(experts), self.num_pieces)
        ]
