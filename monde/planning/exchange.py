"""Seconds of one exchange of routed rows between nodes, by strategy, from the schedule that the dispatcher issues.

Every rank of a node holds the same rows and, after it, the same received rows. M nodes, N ranks of a node.
Redundant: every rank sends all rows. Drop + gather: each sends 1/N, and gathers the rest within its node. Pipelined:
the same in chunks, so that a gather runs beside the next exchange over nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from monde.planning.fit import AlphaBeta
from monde.planning.network_profile import NetworkProfile, WayTimes
from monde.planning.schedule import Resource, Schedule, ScheduleBuilder
from monde.planning.simulate import simulate

CHUNKS = (2, 4, 8, 16)


class Strategy(StrEnum):
    REDUNDANT = "redundant"
    DROP_GATHER = "drop + gather"
    PIPELINED = "pipelined"
    EP = "EP without TP"
    EP_HIERARCHICAL = "EP without TP, hierarchical"
    SHARDING = "sharding"


# What moves rows onto all ranks of a node, with the numbers of chunks worth trying.
REPLICATED: tuple[tuple[Strategy, int], ...] = (
    (Strategy.REDUNDANT, 1),
    (Strategy.DROP_GATHER, 1),
    *((Strategy.PIPELINED, chunks) for chunks in CHUNKS),
)


@dataclass(frozen=True)
class Exchange:
    """One way to make an exchange, and what it takes."""

    strategy: Strategy
    chunks: int
    seconds_s: float


def exchanges(
    network: NetworkProfile, rows_bytes: float, away_bytes: float, adds: bool
) -> tuple[Exchange, ...]:
    """Ways onto all ranks of a node, the soonest first, for the rows that one rank holds.

    away_bytes: of the rows that go to other nodes. adds: each rank holds a part of every row, and the sum arrives.
    """
    found = [
        Exchange(strategy, chunks, exchange_s(network, rows_bytes, away_bytes, adds, strategy, chunks))
        for strategy, chunks in REPLICATED
    ]
    return tuple(sorted(found, key=lambda e: e.seconds_s))


def exchange_s(
    network: NetworkProfile, rows_bytes: float, away_bytes: float, adds: bool, strategy: Strategy, chunks: int
) -> float:
    """By the schedule of collectives, corrected by whole exchanges of this kind where some were measured.

    Measured exchanges are of rows that all leave: linear between their sizes, in proportion to the schedule's seconds
    beyond them and for rows that stay.
    """
    model_s = model_exchange_s(network, rows_bytes, away_bytes, adds, strategy, chunks)
    for way in network.ways:
        if (way.strategy, way.chunks, way.adds) == (strategy, chunks, adds) and away_bytes > 0:
            size = min(max(away_bytes, way.away_bytes[0]), way.away_bytes[-1])
            measured_s = float(np.interp(size, way.away_bytes, way.seconds_s))
            return model_s * measured_s / model_exchange_s(network, size, size, adds, strategy, chunks)
    return model_s


def with_measured(
    network: NetworkProfile, rows_bytes: float, away_bytes: float, adds: bool, measured: Iterable[Exchange]
) -> NetworkProfile:
    """The profile with these exchanges at their size; ways that were not measured keep what they were predicted."""
    taken_s = {(e.strategy, e.chunks): e.seconds_s for e in exchanges(network, rows_bytes, away_bytes, adds)}
    taken_s |= {(e.strategy, e.chunks): e.seconds_s for e in measured}
    before = {(way.strategy, way.chunks): way for way in network.ways if way.adds == adds}
    ways = [way for way in network.ways if way.adds != adds]
    for (strategy, chunks), seconds_s in taken_s.items():
        points = {}
        if (way := before.get((strategy, chunks))) is not None:
            points = dict(zip(way.away_bytes, way.seconds_s, strict=True))
        of_these_s, of_leaving_s = (
            model_exchange_s(network, rows, away_bytes, adds, strategy, chunks)
            for rows in (rows_bytes, away_bytes)
        )
        points[away_bytes] = seconds_s * of_leaving_s / of_these_s
        sizes = tuple(sorted(points))
        ways.append(WayTimes(strategy, chunks, adds, sizes, tuple(points[size] for size in sizes)))
    return replace(network, ways=tuple(ways))


def model_exchange_s(
    network: NetworkProfile, rows_bytes: float, away_bytes: float, adds: bool, strategy: Strategy, chunks: int
) -> float:
    if adds:
        return combine_s(network, rows_bytes, away_bytes, strategy, chunks)
    return dispatch_s(network, away_bytes, strategy, chunks)


def dispatch_s(network: NetworkProfile, away_bytes: float, strategy: Strategy, chunks: int) -> float:
    """Rows to the nodes of their experts, onto all ranks there; those that stay need no network."""
    if strategy is Strategy.REDUNDANT:
        return seconds(network.node_a2a, away_bytes)
    return makespan_s(network, moved(network, away_bytes, chunks))


def combine_s(
    network: NetworkProfile, rows_bytes: float, away_bytes: float, strategy: Strategy, chunks: int
) -> float:
    """Each rank's parts of the outputs summed in the node and sent back, onto all ranks there."""
    N = network.ranks_per_node
    if strategy is Strategy.REDUNDANT:
        sum_s = seconds(network.local_a2a, rows_bytes * (N - 1) / N) + copy_s(network, rows_bytes)
        return sum_s + gather_s(network, rows_bytes) + seconds(network.node_a2a, away_bytes)
    return makespan_s(network, summed(network, rows_bytes, away_bytes, chunks))


def moved(network: NetworkProfile, away_bytes: float, chunks: int) -> Schedule:
    """Drop + gather as the dispatcher issues it: pack, over nodes, gather, unpack, for every chunk."""
    N, build = network.ranks_per_node, ScheduleBuilder()
    part = away_bytes / chunks
    arrived: list[int] = []
    for i in range(chunks):
        packed = build.add(f"pack {i}", Resource.GPU, copy_s(network, part / N))
        a2a_s = seconds(network.node_a2a, part / N)
        arrived.append(build.add(f"over nodes {i}", Resource.LINK_INTER, a2a_s, (packed,)))
    for i in range(chunks):
        woken = build.add(f"wake {i}", Resource.HOST, wake_s(network, chunks), (arrived[i],))
        gathered = build.add(f"gather {i}", Resource.LINK_INTRA, gather_s(network, part), (woken,))
        build.add(f"unpack {i}", Resource.GPU, copy_s(network, part), (gathered,))
    return build.build()


def summed(network: NetworkProfile, rows_bytes: float, away_bytes: float, chunks: int) -> Schedule:
    """Sum in the node onto 1/N of the rows, over nodes, gather: three stages, each a chunk behind the one before."""
    N, build = network.ranks_per_node, ScheduleBuilder()
    part = rows_bytes / chunks
    sum_s = seconds(network.local_a2a, part * (N - 1) / N)
    a2a_s = seconds(network.node_a2a, away_bytes / chunks / N)
    added: dict[int, int] = {}
    arrived: dict[int, int] = {}
    for step in range(chunks + 2):
        if step < chunks:
            sent = build.add(f"to sum {step}", Resource.LINK_INTRA, sum_s)
            added[step] = build.add(f"sum {step}", Resource.GPU, copy_s(network, part), (sent,))
        if 0 <= (i := step - 1) < chunks:
            woken = build.add(f"wake {i}", Resource.HOST, wake_s(network, chunks), (added[i],))
            arrived[i] = build.add(f"over nodes {i}", Resource.LINK_INTER, a2a_s, (woken,))
        if 0 <= (i := step - 2) < chunks:
            woken = build.add(f"wake again {i}", Resource.HOST, wake_s(network, chunks), (arrived[i],))
            gathered = build.add(f"gather {i}", Resource.LINK_INTRA, gather_s(network, part), (woken,))
            build.add(f"unpack {i}", Resource.GPU, copy_s(network, part), (gathered,))
    return build.build()


def wake_s(network: NetworkProfile, chunks: int) -> float:
    """Only pipelines hand over while other work is under way; the collectives' own latencies hold the rest."""
    return network.chunk_s if chunks > 1 else 0.0


def chunk_s_from(network: NetworkProfile, away_bytes: float, chunks: int, measured_s: float) -> float:
    """The chunk_s with which the dispatch of so many chunks takes measured_s, by bisection; 0 where it takes less."""
    low_s, high_s = 0.0, measured_s
    for _ in range(40):
        middle_s = (low_s + high_s) / 2
        guess = replace(network, chunk_s=middle_s)
        if dispatch_s(guess, away_bytes, Strategy.PIPELINED, chunks) < measured_s:
            low_s = middle_s
        else:
            high_s = middle_s
    return low_s


def makespan_s(network: NetworkProfile, schedule: Schedule) -> float:
    return simulate(schedule, {(Resource.LINK_INTER, Resource.LINK_INTRA): network.overlap}).makespan_s


def gather_s(network: NetworkProfile, full_bytes: float) -> float:
    """Each rank has 1/N of full_bytes and ends with all of them; it sends its part to N - 1 others."""
    N = network.ranks_per_node
    return seconds(network.local_gather, full_bytes * (N - 1) / N)


def copy_s(network: NetworkProfile, num_bytes: float) -> float:
    return seconds(network.copy, num_bytes)


def seconds(line: AlphaBeta, num_bytes: float) -> float:
    return float(line.seconds(num_bytes))
