"""Measures the collectives of a mesh into a NetworkProfile, the same on all ranks.

A sample is the time of the slowest rank, agreed on by a maximum over ranks, so every rank fits the same numbers and
plans alike. Sizes grow until a step takes `longest_s`: a slow link is not waited for, a fast one is filled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from monde.device.collectives import start_all_gather, start_all_to_all
from monde.device.mesh import guarded
from monde.planning.exchange import REPLICATED, chunk_s_from
from monde.planning.fit import AlphaBeta, fit_alpha_beta
from monde.planning.network_profile import NetworkProfile, WayTimes
from monde.planning.profile import Overlap
from monde.training.dispatch import NodeExchange, Way
from monde.training.dispatch_routes import Routes
from monde.training.dispatch_rows import Groups, move
from monde.training.turns import Effort, in_turn, seconds_of, slowest

_SMALLEST_BYTES, _GREATEST_BYTES, _GROWTH = 1 << 12, 1 << 28, 4
_CHUNKS = 8
_ROW_BYTES = 1024
_MORE_ROUNDS_S = 1.0  # of one size of one kind of exchange
_NO_PROGRESS = 1e9  # how many times longer something takes that stands still meanwhile
_NOTHING = AlphaBeta(0.0, 0.0)

Start = Callable[[int], Callable[[], object]]
"""Starts a collective that sends the given bytes to other ranks; returns what waits for it."""


@dataclass(frozen=True)
class NetworkEffort:
    """num_samples of every size, of which there are at least three; no size is tried after one took longest_s."""

    num_samples: int = 7
    longest_s: float = 0.1


def measure_network(mesh: DeviceMesh, effort: NetworkEffort | None = None) -> NetworkProfile:
    """Time every collective that a strategy is made of, alone and beside the other network's, on the mesh's devices.

    All ranks call it; nothing else may use the links. Errors: ExchangeFailed when a rank leaves.
    """
    with guarded("measuring the network"):
        probe = _Probe(mesh, effort or NetworkEffort())
        groups = probe.groups
        node, local = groups.num_nodes > 1, groups.num_local > 1
        node_a2a = probe.line(probe.node_a2a) if node else _NOTHING
        local_gather = probe.line(probe.local_gather) if local else _NOTHING
        alone = NetworkProfile(
            num_nodes=groups.num_nodes,
            ranks_per_node=groups.num_local,
            node_a2a=node_a2a,
            node_a2a_alone=probe.line(probe.first_of_node) if node and local else node_a2a,
            local_gather=local_gather,
            local_a2a=probe.line(probe.local_a2a) if local else _NOTHING,
            world_a2a=probe.line(probe.world_a2a) if dist.get_world_size() > 1 else _NOTHING,
            copy=probe.line(probe.copy),
            chunk_s=0.0,
            overlap=probe.overlap(node_a2a, local_gather) if node and local else Overlap(),
            source=f"measured: {dist.get_backend(groups.node)} on {mesh.device_type}, {probe.effort.num_samples} samples "
            "of every size, slowest rank",
        )
        if not (node and local):
            return alone
        return replace(probe.with_chunks(alone), ways=probe.ways(mesh))


def overlap_of(alone_s: tuple[float, float], together_s: tuple[float, float]) -> Overlap:
    """Slow-downs of two activities that start at once, from when each ends; bounded as Overlap demands.

    The one that ends first ran beside the other all the time; the other, alone from then on.
    """
    first, second = (0, 1) if together_s[0] <= together_s[1] else (1, 0)
    slow = [1.0, 1.0]
    slow[first] = max(together_s[first] / alone_s[first], 1.0)
    done_alone_s = together_s[second] - together_s[first]
    left_s = alone_s[second] - done_alone_s
    # Nothing of the second was done meanwhile: as if the two had taken turns.
    slow[second] = max(together_s[first] / left_s, 1.0) if left_s > 0 else float("inf")
    return _no_worse_than_turns(slow[0], slow[1])


def _no_worse_than_turns(first: float, second: float) -> Overlap:
    """1/first + 1/second of at least 1, by speeding both up alike: the planner never gains from less than turns."""
    scale = min(1 / first + 1 / second, 1.0)
    return Overlap(*(min(max(factor * scale, 1.0), _NO_PROGRESS) for factor in (first, second)))


class _Probe:
    def __init__(self, mesh: DeviceMesh, effort: NetworkEffort) -> None:
        self.groups, self.effort = Groups.of(mesh), effort
        self._device = torch.device(mesh.device_type)
        self._pair = ThreadPoolExecutor(2)

    def line(self, start: Start) -> AlphaBeta:
        sizes: list[float] = []
        seconds: list[float] = []
        size = _SMALLEST_BYTES
        while True:
            samples = self._samples(lambda size=size: self._seconds(start, size))  # type: ignore[misc]
            sizes += [float(size)] * len(samples)
            seconds += samples
            enough = len(sizes) >= 3 * self.effort.num_samples
            if (
                enough and median(samples) > self.effort.longest_s / _GROWTH
            ) or size * _GROWTH > _GREATEST_BYTES:
                return fit_alpha_beta(sizes, seconds)
            size *= _GROWTH

    def overlap(self, node_a2a: AlphaBeta, local_gather: AlphaBeta) -> Overlap:
        """Both at once, with bytes for which each alone takes half of longest_s; medians of the slowest rank."""
        sizes = [_size_for(line, self.effort.longest_s / 2) for line in (node_a2a, local_gather)]
        starts = (self.node_a2a, self.local_gather)
        alone_s = [
            median(self._samples(lambda s=start, n=size: self._seconds(s, n)))  # type: ignore[misc]
            for start, size in zip(starts, sizes, strict=True)
        ]
        together: list[list[float]] = [[], []]
        for _ in range(self.effort.num_samples + 1):
            for ended, one in zip(together, slowest(self._at_once(starts, sizes), self._device), strict=True):
                ended.append(one)
        together_s = [median(ended[1:]) for ended in together]
        return overlap_of((alone_s[0], alone_s[1]), (together_s[0], together_s[1]))

    def with_chunks(self, network: NetworkProfile) -> NetworkProfile:
        """With the chunk_s that explains a pipeline of many small chunks, made by the dispatcher itself."""
        M, rows = self.groups.num_nodes, _CHUNKS * self.groups.num_local
        routes = Routes(((rows,) * M,) * M, self.groups.node_idx)
        x_RD = self._bytes(rows * M * _SMALLEST_BYTES).view(rows * M, _SMALLEST_BYTES)
        measured = self._samples(
            lambda: seconds_of(lambda: move(x_RD, routes, self.groups, _CHUNKS), self._device)
        )
        away_bytes = rows * (M - 1) * _SMALLEST_BYTES
        return replace(network, chunk_s=chunk_s_from(network, away_bytes, _CHUNKS, median(measured)))

    def ways(self, mesh: DeviceMesh) -> tuple[WayTimes, ...]:
        """Whole exchanges in turn, at sizes that grow until the redundant one would take four times longest_s."""
        exchanges = [NodeExchange(mesh, Way(strategy, chunks)) for strategy, chunks in REPLICATED]
        kinds = [(exchange, adds) for adds in (False, True) for exchange in exchanges]
        seconds: list[list[float]] = [[] for _ in kinds]
        sizes: list[float] = []
        size = _SMALLEST_BYTES * _GROWTH
        while True:
            rows = size // _ROW_BYTES
            M, me = self.groups.num_nodes, self.groups.node_idx
            each = rows // (M - 1)
            routes = Routes(tuple(tuple(each if i != j else 0 for j in range(M)) for i in range(M)), me)
            x_RD = torch.zeros(each * (M - 1), _ROW_BYTES // 4, device=self._device)
            steps = [partial(exchange.run, x_RD, routes, adds) for exchange, adds in kinds]
            sizes.append(float(each * (M - 1) * _ROW_BYTES))
            ways = len(exchanges)  # a dispatch competes with dispatches, a combine with combines
            medians = [*self._in_turn(steps[:ways]), *self._in_turn(steps[ways:])]
            for found, one in zip(seconds, medians, strict=True):
                found.append(one)
            if medians[0] * _GROWTH > 4 * self.effort.longest_s or size * _GROWTH > _GREATEST_BYTES:
                break
            size *= _GROWTH
        return tuple(
            WayTimes(strategy, chunks, adds, tuple(sizes), tuple(found))
            for (strategy, chunks), adds, found in zip(
                (*REPLICATED, *REPLICATED), (adds for _, adds in kinds), seconds, strict=True
            )
        )

    def _in_turn(self, steps: Sequence[Callable[[], object]]) -> list[float]:
        num_samples = self.effort.num_samples
        effort = Effort(num_samples, num_samples, _MORE_ROUNDS_S)
        return [median(one) for one in in_turn(steps, self._device, effort)]

    def _samples(self, measure: Callable[[], float]) -> list[float]:
        """After one to warm up; a rank that has nothing to do counts as 0."""
        measured = [measure() for _ in range(self.effort.num_samples + 1)]
        return slowest(measured, self._device)[1:]

    def _seconds(self, start: Start, num_bytes: int) -> float:
        return seconds_of(lambda: start(num_bytes)(), self._device)

    def _at_once(self, starts: tuple[Start, Start], sizes: list[int]) -> list[float]:
        def until_done(start: Start, num_bytes: int) -> float:
            stream = torch.cuda.Stream() if self._device.type == "cuda" else None
            with torch.cuda.stream(stream):
                start(num_bytes)()
                if stream is not None:
                    stream.synchronize()
            return time.perf_counter()

        dist.barrier()
        self._synchronize()
        begin_s = time.perf_counter()
        pending = [
            self._pair.submit(until_done, start, size) for start, size in zip(starts, sizes, strict=True)
        ]
        return [one.result() - begin_s for one in pending]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    # ---- what is timed: bytes are those sent to others ----

    def node_a2a(self, num_bytes: int) -> Callable[[], object]:
        return self._to_others(num_bytes, self.groups.node, self.groups.node_idx, self.groups.num_nodes)

    def first_of_node(self, num_bytes: int) -> Callable[[], object]:
        return self.node_a2a(num_bytes) if self.groups.local_idx == 0 else lambda: None

    def local_a2a(self, num_bytes: int) -> Callable[[], object]:
        return self._to_others(num_bytes, self.groups.local, self.groups.local_idx, self.groups.num_local)

    def world_a2a(self, num_bytes: int) -> Callable[[], object]:
        return self._to_others(num_bytes, self.groups.world, dist.get_rank(), dist.get_world_size())

    def local_gather(self, num_bytes: int) -> Callable[[], object]:
        mine = self._bytes(num_bytes // (self.groups.num_local - 1))
        everything = self._bytes(mine.numel() * self.groups.num_local)
        return start_all_gather(everything, mine, self.groups.local)

    def copy(self, num_bytes: int) -> Callable[[], object]:
        source, target = (
            self._bytes(num_bytes).split(num_bytes // 4),
            self._bytes(num_bytes).split(num_bytes // 4),
        )
        torch._foreach_copy_(list(target), list(source[::-1]))
        return lambda: None

    def _to_others(
        self, num_bytes: int, group: dist.ProcessGroup, me: int, size: int
    ) -> Callable[[], object]:
        splits = [0 if i == me else num_bytes // (size - 1) for i in range(size)]
        sent, received = self._bytes(sum(splits)), self._bytes(sum(splits))
        return start_all_to_all(received, sent, splits, splits, group)

    def _bytes(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)


def _size_for(line: AlphaBeta, seconds_s: float) -> int:
    bytes_for = (
        (seconds_s - line.alpha_s) / line.s_per_unit if line.s_per_unit > 0 else float(_GREATEST_BYTES)
    )
    return int(min(max(bytes_for, _SMALLEST_BYTES), _GREATEST_BYTES // 4))
