"""What the device computes of a layer, in which order, as arrays: rows of pairs by expert, waves of pieces, tiles.

Letters: E experts, n pieces of experts in a wave, N pairs that the device computes, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from monde.executors.pieces import PackedAt

Ints = NDArray[np.int64]
_MMA_ROWS = 16  # a product takes so many rows at once


@dataclass(frozen=True)
class Order:
    """Expert e's pairs are the rows [begin_E[e], begin_E[e] + tokens_E[e]); -1 where others compute them."""

    begin_E: Ints
    tokens_E: Ints
    num_rows: int

    @classmethod
    def of(cls, experts: Ints, tokens_E: Ints) -> Order:
        ends = np.cumsum(tokens_E[experts], dtype=np.int64)
        begin_E = np.full(len(tokens_E), -1, np.int64)
        begin_E[experts] = ends - tokens_E[experts]
        return cls(begin_E, tokens_E, int(ends[-1]) if len(ends) else 0)


@dataclass(frozen=True)
class Wave:
    """Rows [first_row, first_row + num_rows) of F of n experts, computed together.

    Piece i lies from offsets_n[i] bytes on in what holds all of them, `at` says where its parts lie from there; its
    biases are row bias_rows_n[i]; its pairs are counts_n[i] rows from begins_n[i] on.
    """

    first_row: int
    num_rows: int
    at: PackedAt
    offsets_n: Ints
    bias_rows_n: Ints
    begins_n: Ints
    counts_n: Ints

    @classmethod
    def of(
        cls,
        experts: Ints,
        rows: tuple[int, int],
        at: PackedAt,
        offsets_n: Ints,
        bias_rows_n: Ints,
        order: Order,
    ) -> Wave:
        """Of pieces with these first and numbers of rows; experts that have no pairs here are left out."""
        here = (order.begin_E[experts] >= 0) & (order.tokens_E[experts] > 0)
        experts = experts[here]
        return cls(
            *rows,
            at,
            offsets_n[here],
            bias_rows_n[here],
            order.begin_E[experts],
            order.tokens_E[experts],
        )


def tiles_of(waves: Sequence[Wave], tile_rows: int) -> tuple[Ints, list[int]]:
    """[n, 4]: (offset, first row, rows, row of the biases) of every block of rows; and the blocks of every wave.

    A block has at most tile_rows rows of one piece; those of a piece are about equal.
    """
    if not waves:
        return np.zeros((0, 4), np.int64), []
    offsets_n, begins_n, counts_n, bias_rows_n = (
        np.concatenate([getattr(wave, name) for wave in waves])
        for name in ("offsets_n", "begins_n", "counts_n", "bias_rows_n")
    )
    num_tiles_n = -(-counts_n // tile_rows)
    rows_n = -(-counts_n // (num_tiles_n * _MMA_ROWS)) * _MMA_ROWS
    ends_n = np.cumsum(num_tiles_n)
    i = np.repeat(np.arange(len(num_tiles_n)), num_tiles_n)
    done = (np.arange(len(i)) - (ends_n - num_tiles_n)[i]) * rows_n[i]
    rows = np.minimum(rows_n[i], counts_n[i] - done)
    ends_w = np.append(0, ends_n)[np.cumsum([0, *(len(wave.counts_n) for wave in waves)])]
    tiles = np.stack([offsets_n[i], begins_n[i] + done, rows, bias_rows_n[i]], 1)
    return tiles, np.diff(ends_w).tolist()


@dataclass
class Phases:
    """Seconds of Python in a layer, summed over num_layers; the waits are for counts and for the host's answer."""

    count_s: float = 0.0
    count_wait_s: float = 0.0
    plan_s: float = 0.0
    launch_s: float = 0.0
    host_wait_s: float = 0.0
    combine_s: float = 0.0
    num_layers: int = 0

    def add(self, times_s: Sequence[float]) -> None:
        """When each phase began, and when the last one ended."""
        for name, (begin_s, end_s) in zip(PHASES, pairwise(times_s), strict=True):
            setattr(self, name, getattr(self, name) + end_s - begin_s)
        self.num_layers += 1


PHASES = ("count_s", "count_wait_s", "plan_s", "launch_s", "host_wait_s", "combine_s")
