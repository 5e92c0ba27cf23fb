"""How many rows go from where to where, and which of them each rank of a node takes. Pure arithmetic on counts.

M nodes, N ranks of a node, W ranks, n chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

Range = tuple[int, int]  # first row, number of rows


@dataclass(frozen=True)
class Routes:
    """counts[i][j]: rows from place i to place j, the same record on all ranks; here: the place of this rank.

    Places are nodes, whose ranks all hold the same rows, or ranks. Rows lie sorted by the place they go to, and
    arrive sorted by the place they come from, otherwise in their order.
    """

    counts: tuple[tuple[int, ...], ...]
    here: int

    @cached_property
    def sent(self) -> tuple[int, ...]:
        """Rows to every place."""
        return self.counts[self.here]

    @cached_property
    def received(self) -> tuple[int, ...]:
        """Rows from every place."""
        return tuple(row[self.here] for row in self.counts)

    @cached_property
    def back(self) -> Routes:
        """The way back: what was received is sent."""
        return Routes(tuple(zip(*self.counts, strict=True)), self.here)

    @cached_property
    def most_rows(self) -> int:
        """The rows of the busiest place, sent or received: what all others wait for."""
        return max(map(sum, (*self.counts, *zip(*self.counts, strict=True))))

    @cached_property
    def most_away(self) -> int:
        """The same, of rows between two places."""
        away = [[0 if i == j else n for j, n in enumerate(row)] for i, row in enumerate(self.counts)]
        return max(map(sum, (*away, *zip(*away, strict=True))))

    @property
    def num_sent(self) -> int:
        return sum(self.sent)

    @property
    def num_received(self) -> int:
        return sum(self.received)


def starts(counts: tuple[int, ...]) -> tuple[int, ...]:
    """The first row of every place."""
    offsets, total = [], 0
    for count in counts:
        offsets.append(total)
        total += count
    return tuple(offsets)


def cut(count: int, parts: int, part: int) -> Range:
    """Part `part` of `count` rows in order; parts differ by one row at most."""
    first = count * part // parts
    return first, count * (part + 1) // parts - first


def share(counts: tuple[int, ...], num_chunks: int, chunk: int, num_ranks: int, rank: int) -> list[Range]:
    """For every place, the rows of `chunk` that `rank` of the node takes: a chunk is cut among its ranks."""
    ranges = []
    for start, count in zip(starts(counts), counts, strict=True):
        first, in_chunk = cut(count, num_chunks, chunk)
        offset, num_rows = cut(in_chunk, num_ranks, rank)
        ranges.append((start + first + offset, num_rows))
    return ranges


def num_rows(ranges: list[Range]) -> int:
    return sum(rows for _, rows in ranges)
