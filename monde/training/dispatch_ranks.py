"""Expert parallelism without tensor parallelism: rows between single ranks, at once or in two stages.

Every rank holds its own rows. Hierarchical: first within the node, to the rank with the place of the target in its
node, then over nodes: N - 1 + M - 1 messages a rank instead of M N - 1. Rows arrive in the same order either way.
M nodes, N ranks of a node, W ranks, R rows sent, S rows received.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from monde.device.collectives import start_all_gather, start_all_to_all
from monde.device.mesh import agree, guarded
from monde.training.dispatch_routes import Routes, cut, starts
from monde.training.dispatch_rows import Groups, apply


class RankExchange:
    """Exchanges over a mesh with the dims "node" and "local"; `combine` is the way back of `dispatch`.

    Errors: as those of NodeExchange.
    """

    def __init__(self, mesh: DeviceMesh, hierarchical: bool) -> None:
        self._groups = Groups.of(mesh)
        self._device_type = mesh.device_type
        self._hierarchical = hierarchical
        agree(hierarchical, "RankExchange", mesh.device_type)

    def routes(self, counts: Sequence[int]) -> Routes:
        """From the rows that this rank sends to every rank. One collective of all ranks; waits for it."""
        world = dist.get_world_size()
        if len(counts) != world or min(counts) < 0:
            raise ValueError(f"routes: expected rows to {world} ranks, 0 or more, got {list(counts)}")
        mine_W = torch.tensor(counts, dtype=torch.int64, device=self._device_type)
        all_WW = mine_W.new_empty(world * world)
        with guarded("routes: all-gather of counts"):
            start_all_gather(all_WW, mine_W)()
            return Routes(tuple(tuple(row) for row in all_WW.view(world, world).tolist()), dist.get_rank())

    def dispatch(self, x_RD: Tensor, routes: Routes) -> Tensor:
        """x_RD, sorted by rank, to y_SD on the ranks they go to, sorted by the rank they come from. Any dtype."""
        return apply(_Between, x_RD, self, routes)

    def combine(self, y_SD: Tensor, routes: Routes) -> Tensor:
        """The rows of `dispatch` with the same routes back where they came from, in their order."""
        return self.dispatch(y_SD, routes.back)

    def run(self, x_RD: Tensor, routes: Routes) -> Tensor:
        """One exchange, without autograd."""
        if x_RD.shape[0] != routes.num_sent:
            raise ValueError(f"exchange: expected {routes.num_sent} rows by the routes, got {x_RD.shape[0]}")
        shape = (routes.num_received, *x_RD.shape[1:])
        row_elements = math.prod(x_RD.shape[1:])
        if row_elements == 0:
            return x_RD.new_empty(shape)
        rows = x_RD.detach().reshape(x_RD.shape[0], row_elements).contiguous().view(torch.uint8)
        with guarded("exchange of rows between ranks"):
            if self._hierarchical:
                y = _in_two_stages(rows, routes, self._groups)
            else:
                y = _all_to_all(rows, routes.received, routes.sent, self._groups.world)
        return y.view(x_RD.dtype).reshape(shape)


def _in_two_stages(x_RD: Tensor, routes: Routes, groups: Groups) -> Tensor:
    M, N, here = groups.num_nodes, groups.num_local, groups.node_idx
    first_W = starts(routes.sent)
    for_place = [
        node * N + l for l in range(N) for node in range(M)
    ]  # ranks to send to, by place in their node
    packed = torch.cat([x_RD[first_W[w] : first_W[w] + routes.sent[w]] for w in for_place])
    neighbours = [routes.counts[here * N + l] for l in range(N)]
    mine = groups.local_idx
    splits = [sum(routes.sent[node * N + l] for node in range(M)) for l in range(N)]
    arriving = [sum(row[node * N + mine] for node in range(M)) for row in neighbours]
    relayed = _all_to_all(packed, arriving, splits, groups.local)
    # From neighbours' order, then nodes', to nodes' order, then neighbours': the order of ranks at the target.
    counts_NM = [[row[node * N + mine] for node in range(M)] for row in neighbours]
    blocks = iter(relayed.split([count for row in counts_NM for count in row]))
    block_NM = [[next(blocks) for _ in range(M)] for _ in range(N)]
    packed = torch.cat([block_NM[l][node] for node in range(M) for l in range(N)])
    splits = [sum(counts_NM[l][node] for l in range(N)) for node in range(M)]
    arriving = [sum(routes.received[node * N : node * N + N]) for node in range(M)]
    return _all_to_all(packed, arriving, splits, groups.node)


def _all_to_all(
    x_RD: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    y_SD = x_RD.new_empty(sum(received), *x_RD.shape[1:])
    start_all_to_all(y_SD, x_RD, received, sent, group)()
    return y_SD


class _Between(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, exchange: RankExchange, routes: Routes) -> Tensor:
        ctx.way_back = exchange, routes.back
        return exchange.run(x_RD, routes)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        return apply(_Between, grad_SD, *ctx.way_back), None, None


def drop_to_share(x_TD: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's share of tokens that all ranks of its node hold: 1/N of them, in order; backward gathers."""
    return apply(_Share, x_TD, Groups.of(mesh), x_TD.shape[0], False)


def gather_shares(x_tD: Tensor, mesh: DeviceMesh, num_tokens: int) -> Tensor:
    """All shares of the node's `num_tokens` on all its ranks, whose gradients must be alike; backward drops."""
    return apply(_Share, x_tD, Groups.of(mesh), num_tokens, True)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups, num_tokens: int, gather: bool) -> Tensor:
        ctx.way_back = groups, num_tokens, not gather
        first, rows = cut(num_tokens, groups.num_local, groups.local_idx)
        if not gather:
            return x[first : first + rows].clone()
        if x.shape[0] != rows:
            raise ValueError(
                f"gather_shares: expected this rank's {rows} of {num_tokens} tokens, got {x.shape[0]}"
            )
        shares = [cut(num_tokens, groups.num_local, l)[1] for l in range(groups.num_local)]
        padded = x.new_zeros(max(shares), *x.shape[1:])
        padded[:rows] = x
        all_shares = x.new_empty(groups.num_local * max(shares), *x.shape[1:])
        with guarded("gather of shares"):
            start_all_gather(all_shares, padded, groups.local)()
        return torch.cat(
            [one[:n] for one, n in zip(all_shares.split(max(shares) or 1), shares, strict=False)]
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return apply(_Share, grad, *ctx.way_back), None, None, None
