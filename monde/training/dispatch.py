"""Routed rows to the nodes of their experts and back, by the strategy that suits the network, exact in autograd.

Tensor parallelism leaves the same rows on all N ranks of a node; experts lie on a node, cut over its ranks.

    exchange = NodeExchange(mesh, Way(Strategy.PIPELINED, 4))        # or a NetworkProfile: the soonest way, each time
    rows = rows_by_node(topk_ids_TK, node_of_expert_E, num_nodes)    # a token once to each node it needs
    routes = exchange.routes(rows.counts)                            # the one synchronisation
    x_SD = exchange.dispatch(x_TD[rows.token_R], routes)
    ids_SK = exchange.dispatch(topk_ids_TK[rows.token_R], routes)    # any dtype and shape
    y_RD = exchange.combine(experts(x_SD, ids_SK), routes)           # parts of every rank summed on the way
    y_TD = torch.zeros_like(x_TD).index_add(0, rows.token_R, y_RD)

Every strategy gives the same rows and gradients, bit for bit. All ranks make the same calls in the same order.
R rows sent, S rows received, T tokens, K experts of a token, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from monde.device.collectives import start_all_gather
from monde.device.mesh import agree, guarded
from monde.planning.exchange import REPLICATED, Exchange, Strategy
from monde.planning.network_profile import NetworkProfile
from monde.training.dispatch_choice import Chooser
from monde.training.dispatch_routes import Routes
from monde.training.dispatch_rows import Groups, add_and_move, add_redundant, apply, move, move_redundant

_SUMMED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Way:
    """A strategy for rows that all ranks of a node hold; chunks: 2 or more for Strategy.PIPELINED, else 1."""

    strategy: Strategy
    chunks: int = 1

    def __post_init__(self) -> None:
        known = {strategy for strategy, _ in REPLICATED}
        if (
            self.strategy not in known
            or self.chunks < 1
            or (self.chunks > 1) != (self.strategy is Strategy.PIPELINED)
        ):
            raise ValueError(
                f"Way: expected one of {', '.join(sorted(known))}, with 2 or more chunks when pipelined and 1 "
                f"otherwise, got {self.strategy} in {self.chunks}"
            )


@dataclass(frozen=True)
class NodeRows:
    """Rows sorted by node: the token of each, and how many go to every node."""

    token_R: Tensor
    counts: tuple[int, ...]


def rows_by_node(topk_ids_TK: Tensor, node_of_expert_E: Tensor, num_nodes: int) -> NodeRows:
    """Every token once for each node that has at least one of its experts."""
    goes_TM = torch.zeros(topk_ids_TK.shape[0], num_nodes, dtype=torch.bool, device=topk_ids_TK.device)
    goes_TM.scatter_(1, node_of_expert_E[topk_ids_TK], True)
    token_R = goes_TM.T.nonzero()[:, 1]
    return NodeRows(token_R, tuple(goes_TM.sum(0).tolist()))


class NodeExchange:
    """Exchanges over a mesh with the dims "node" and "local" (monde.device.mesh.open_mesh).

    way: a Way, or a NetworkProfile of this mesh, by which the soonest way is chosen for every exchange (the first of
    a size tries those that are close, see dispatch_choice.py); the same on all ranks. Errors: ValueError on all ranks where ranks disagree; ExchangeFailed, within the time limit of the
    mesh's groups, on every rank that waits for one which is gone.
    """

    def __init__(self, mesh: DeviceMesh, way: Way | NetworkProfile) -> None:
        self._groups = Groups.of(mesh)
        self._device = torch.device(mesh.device_type)
        if isinstance(way, NetworkProfile) and (way.num_nodes, way.ranks_per_node) != tuple(mesh.shape):
            raise ValueError(
                f"NodeExchange: the network profile is of {way.num_nodes}x{way.ranks_per_node} ranks, the mesh is "
                f"{'x'.join(map(str, mesh.shape))}; measure this mesh with monde.calibration.network"
            )
        agree(asdict(way), "NodeExchange", mesh.device_type)
        self._way = way if isinstance(way, Way) else Chooser(way, self._device)

    def routes(self, counts: Sequence[int]) -> Routes:
        """From the rows that this node sends to every node. One collective of all ranks; waits for it.

        Errors: ValueError on all ranks when ranks of one node bring different counts.
        """
        groups = self._groups
        if len(counts) != groups.num_nodes or min(counts) < 0:
            raise ValueError(
                f"routes: expected rows to {groups.num_nodes} nodes, 0 or more, got {list(counts)}"
            )
        mine_M = torch.tensor(counts, dtype=torch.int64, device=self._device)
        all_WM = mine_M.new_empty(dist.get_world_size() * groups.num_nodes)
        with guarded("routes: all-gather of counts"):
            start_all_gather(all_WM, mine_M)()
            of_rank = [tuple(row) for row in all_WM.view(-1, groups.num_nodes).tolist()]
        for rank, row in enumerate(of_rank):
            first = rank - rank % groups.num_local
            if row != of_rank[first]:
                raise ValueError(
                    f"routes: rank {rank} sends {list(row)} rows to the nodes, rank {first} of the same node "
                    f"{list(of_rank[first])}; ranks of a node must hold the same rows (EP without TP: RankExchange)"
                )
        return Routes(tuple(of_rank[:: groups.num_local]), groups.node_idx)

    def dispatch(self, x_RD: Tensor, routes: Routes, parts_in_backward: bool = True) -> Tensor:
        """x_RD, sorted by node and the same on all ranks of a node, to y_SD on all ranks of the nodes they go to.

        Any dtype and any shape behind the rows. parts_in_backward: each rank's gradient is of its own slice of the
        experts, and backward adds them up; False where they were added already.
        """
        return _differentiable(x_RD, self, routes, False, parts_in_backward)

    def combine(self, y_SD: Tensor, routes: Routes, parts: bool = True) -> Tensor:
        """The way back of `dispatch` with the same routes, onto all ranks of the nodes that the rows came from.

        parts: y_SD is this rank's part of the experts' outputs and the sum over the node is sent; it is formed in
        fp32 for 16-bit types, in the order of ranks. False: y_SD is whole and the same on all ranks of a node.
        """
        return _differentiable(y_SD, self, routes.back, parts, False)

    def way_of(self, routes: Routes, row_bytes: int, adds: bool) -> Way:
        """What an exchange of these rows will do by what is known now, the same on all ranks."""
        if isinstance(self._way, Way):
            return self._way
        best = self._way.best(routes.most_rows * row_bytes, routes.most_away * row_bytes, adds)
        return Way(best.strategy, best.chunks)

    def run(self, x_RD: Tensor, routes: Routes, adds: bool) -> Tensor:
        """One exchange, without autograd."""
        if x_RD.shape[0] != routes.num_sent:
            raise ValueError(f"exchange: expected {routes.num_sent} rows by the routes, got {x_RD.shape[0]}")
        if adds and x_RD.dtype not in _SUMMED:
            raise ValueError(f"exchange: sums are of {', '.join(map(str, _SUMMED))}, got {x_RD.dtype}")
        shape = (routes.num_received, *x_RD.shape[1:])
        row_elements = math.prod(x_RD.shape[1:])
        if row_elements == 0:
            return x_RD.new_empty(shape)
        flat = x_RD.detach().reshape(x_RD.shape[0], row_elements).contiguous()
        rows = flat if adds else flat.view(torch.uint8)  # bytes travel: backends lack fp8 and bool
        row_bytes = row_elements * x_RD.element_size()

        def by(way: Way | Exchange) -> Tensor:
            if way.strategy is Strategy.REDUNDANT:
                return (add_redundant if adds else move_redundant)(rows, routes, self._groups)
            return (add_and_move if adds else move)(rows, routes, self._groups, way.chunks)

        if isinstance(self._way, Chooser):
            with guarded("exchange of rows, trying ways"):
                self._way.settle(routes.most_rows * row_bytes, routes.most_away * row_bytes, adds, by)
        way = self.way_of(routes, row_bytes, adds)
        with guarded(f"exchange of rows, {way.strategy}"):
            y = by(way)
        return y.view(x_RD.dtype).reshape(shape)


class _Exchange(torch.autograd.Function):
    """Its backward is the exchange the other way, which adds where this one's output was copied, and is differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, exchange: NodeExchange, routes: Routes, adds: bool, back_adds: bool
    ) -> Tensor:
        ctx.way_back = exchange, routes.back, back_adds, adds
        return exchange.run(x_RD, routes, adds)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None, None, None]:
        return apply(_Exchange, grad_SD, *ctx.way_back), None, None, None, None


def _differentiable(
    x_RD: Tensor, exchange: NodeExchange, routes: Routes, adds: bool, back_adds: bool
) -> Tensor:
    return apply(_Exchange, x_RD, exchange, routes, adds, back_adds)
