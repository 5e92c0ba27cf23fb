"""Rows between nodes, onto all ranks of the node they go to: the exchanges themselves, without autograd.

Every rank of a node holds the same rows (`move`) or a part of every row (`add_and_move`, whose sum arrives). Pipelines
keep one exchange over nodes under way, and beside it what happens within the node, on a group of its own.

D: a row flattened; R rows sent, S rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from monde.device.collectives import start_all_gather, start_all_to_all
from monde.device.mesh import LOCAL, NODE, check_mesh
from monde.training.dispatch_routes import Range, Routes, num_rows, share


@dataclass(frozen=True)
class Groups:
    """The process groups of a mesh and this rank's place in it."""

    world: dist.ProcessGroup
    node: dist.ProcessGroup
    local: dist.ProcessGroup
    num_nodes: int
    num_local: int
    node_idx: int
    local_idx: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Groups:
        check_mesh(mesh)
        num_nodes, num_local = mesh.shape
        node, local = mesh.get_group(NODE), mesh.get_group(LOCAL)
        world = dist.group.WORLD
        assert world is not None
        return cls(
            world, node, local, num_nodes, num_local, mesh.get_local_rank(NODE), mesh.get_local_rank(LOCAL)
        )


def apply(function: type[torch.autograd.Function], x: Tensor, *arguments: object) -> Tensor:
    y = function.apply(x, *arguments)
    assert isinstance(y, Tensor)
    return y


def move_redundant(x_RD: Tensor, routes: Routes, groups: Groups) -> Tensor:
    """Every rank sends all its rows to its counterpart on each node."""
    y_SD = x_RD.new_empty(routes.num_received, *x_RD.shape[1:])
    start_all_to_all(y_SD, x_RD, routes.received, routes.sent, groups.node)()
    return y_SD


def add_redundant(x_RD: Tensor, routes: Routes, groups: Groups) -> Tensor:
    """An all-reduce in the node, then as above. Its sum is in the order of ranks, as that of the other ways."""
    all_rows = Routes(((x_RD.shape[0],),), 0)
    gather = _Gather(all_rows, groups, 1)
    y_RD = torch.empty_like(x_RD)
    mine_rD = _Sum(x_RD, all_rows, groups, 1).start(0)()
    gather.start(mine_rD, 0, y_RD)()
    return move_redundant(y_RD, routes, groups)


def move(x_RD: Tensor, routes: Routes, groups: Groups, num_chunks: int) -> Tensor:
    """1/N of the rows over nodes, then gathered in the node, in chunks. Rows of the own node are only copied."""
    y_SD = x_RD.new_empty(routes.num_received, *x_RD.shape[1:])
    _copy_own(x_RD, y_SD, routes)
    away = _Away(routes, groups, num_chunks, own=False)
    gather = _Gather(routes, groups, num_chunks, own=False)
    over_nodes = away.start(away.pack(x_RD, 0), 0)
    unpack: Callable[[], None] | None = None
    for chunk in range(num_chunks):
        following = away.pack(x_RD, chunk + 1) if chunk + 1 < num_chunks else None
        arrived_sD = over_nodes()
        if following is not None:
            over_nodes = away.start(following, chunk + 1)
        gathered = gather.start(arrived_sD, chunk, y_SD)
        if unpack is not None:
            unpack()
        unpack = gathered
    assert unpack is not None
    unpack()
    return y_SD


def add_and_move(x_RD: Tensor, routes: Routes, groups: Groups, num_chunks: int) -> Tensor:
    """Sums in the node onto 1/N of the rows, over nodes, gathered in the node: each a chunk behind the one before."""
    y_SD = x_RD.new_empty(routes.num_received, *x_RD.shape[1:])
    away = _Away(routes, groups, num_chunks, own=True)
    gather = _Gather(routes, groups, num_chunks, own=True)
    sums = _Sum(x_RD, routes, groups, num_chunks)
    added: dict[int, Callable[[], Tensor]] = {}
    over_nodes: dict[int, Callable[[], Tensor]] = {}
    unpack: dict[int, Callable[[], None]] = {}
    for step in range(num_chunks + 3):
        if step < num_chunks:
            added[step] = sums.start(step)
        arrived_sD = over_nodes.pop(step - 2)() if step - 2 in over_nodes else None
        if step - 1 in added:
            over_nodes[step - 1] = away.start(added.pop(step - 1)(), step - 1)
        if arrived_sD is not None:
            unpack[step - 2] = gather.start(arrived_sD, step - 2, y_SD)
        if step - 3 in unpack:
            unpack.pop(step - 3)()
    return y_SD


class _Away:
    """This rank's share of the rows to its counterparts."""

    def __init__(self, routes: Routes, groups: Groups, num_chunks: int, own: bool) -> None:
        self._routes, self._groups, self._num_chunks, self._own = routes, groups, num_chunks, own

    def pack(self, x_RD: Tensor, chunk: int) -> Tensor:
        return _rows(x_RD, self._ranges(self._routes.sent, chunk))

    def start(self, x_rD: Tensor, chunk: int) -> Callable[[], Tensor]:
        splits = [rows for _, rows in self._ranges(self._routes.sent, chunk)]
        arriving = [rows for _, rows in self._ranges(self._routes.received, chunk)]
        y_sD = x_rD.new_empty(sum(arriving), *x_rD.shape[1:])
        done = start_all_to_all(y_sD, x_rD, arriving, splits, self._groups.node)

        def wait() -> Tensor:
            done()
            return y_sD

        return wait

    def _ranges(self, counts: tuple[int, ...], chunk: int) -> list[Range]:
        g = self._groups
        return _without_own(
            share(counts, self._num_chunks, chunk, g.num_local, g.local_idx), self._routes, self._own
        )


class _Gather:
    """Shares of received rows to all ranks of the node, padded to the longest share, and into their places."""

    def __init__(self, routes: Routes, groups: Groups, num_chunks: int, own: bool = True) -> None:
        self._routes, self._groups, self._num_chunks, self._own = routes, groups, num_chunks, own

    def start(self, x_sD: Tensor, chunk: int, y_SD: Tensor) -> Callable[[], None]:
        g = self._groups
        shares = [
            _without_own(
                share(self._routes.received, self._num_chunks, chunk, g.num_local, l), self._routes, self._own
            )
            for l in range(g.num_local)
        ]
        longest = max(num_rows(ranges) for ranges in shares)
        padded = x_sD if x_sD.shape[0] == longest else _padded(x_sD, longest)
        gathered = x_sD.new_empty(g.num_local * longest, *x_sD.shape[1:])
        done = start_all_gather(gathered, padded, g.local)

        def wait() -> None:
            done()
            sources, targets = [], []
            for l, ranges in enumerate(shares):
                source = l * longest
                for first, rows in ranges:
                    if rows:
                        sources.append(gathered[source : source + rows])
                        targets.append(y_SD[first : first + rows])
                    source += rows
            if targets:
                torch._foreach_copy_(targets, sources)

        return wait


class _Sum:
    """Parts of the rows to the ranks whose share they are, added there in the order of ranks, rounded once.

    An exchange and a sum instead of reduce-scatter: as many bytes, one result whatever the backend, and Gloo's
    reduce-scatter is an all-reduce for every rank.
    """

    def __init__(self, x_RD: Tensor, routes: Routes, groups: Groups, num_chunks: int) -> None:
        self._x_RD, self._routes, self._groups, self._num_chunks = x_RD, routes, groups, num_chunks

    def start(self, chunk: int) -> Callable[[], Tensor]:
        g = self._groups
        shares = [
            share(self._routes.sent, self._num_chunks, chunk, g.num_local, l) for l in range(g.num_local)
        ]
        splits = [num_rows(ranges) for ranges in shares]
        packed = _rows(self._x_RD, [one for ranges in shares for one in ranges])
        mine = splits[g.local_idx]
        parts_NrD = packed.new_empty(g.num_local, mine, *packed.shape[1:])
        arriving = [mine] * g.num_local
        done = start_all_to_all(parts_NrD.flatten(0, 1), packed, arriving, splits, g.local)

        def wait() -> Tensor:
            done()
            wide = torch.float32 if parts_NrD.dtype in (torch.bfloat16, torch.float16) else parts_NrD.dtype
            total = parts_NrD[0].to(wide, copy=True)
            for part in parts_NrD[1:]:
                total += part
            return total.to(parts_NrD.dtype)

        return wait


def _copy_own(x_RD: Tensor, y_SD: Tensor, routes: Routes) -> None:
    sent, received, rows = (
        sum(routes.sent[: routes.here]),
        sum(routes.received[: routes.here]),
        routes.sent[routes.here],
    )
    y_SD[received : received + rows] = x_RD[sent : sent + rows]


def _without_own(ranges: list[Range], routes: Routes, own: bool) -> list[Range]:
    return (
        ranges
        if own
        else [(first, 0 if i == routes.here else rows) for i, (first, rows) in enumerate(ranges)]
    )


def _rows(x_RD: Tensor, ranges: list[Range]) -> Tensor:
    return torch.cat([x_RD[first : first + rows] for first, rows in ranges])


def _padded(x_sD: Tensor, num_rows: int) -> Tensor:
    padded = x_sD.new_zeros(num_rows, *x_sD.shape[1:])
    padded[: x_sD.shape[0]] = x_sD
    return padded
