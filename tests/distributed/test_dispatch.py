"""Exchanges of rows on 2 and 4 Gloo ranks: every strategy moves the same rows and gradients, whatever the counts."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from monde.device.mesh import ExchangeFailed, agree, open_mesh
from monde.planning.exchange import Strategy
from monde.planning.network_profile import CLUSTERS
from monde.training.dispatch import NodeExchange, Way, rows_by_node
from monde.training.dispatch_ranks import RankExchange, drop_to_share, gather_shares
from tests.distributed.ranks import run_ranks

REDUNDANT = Way(Strategy.REDUNDANT)
WAYS = [Way(Strategy.DROP_GATHER), *(Way(Strategy.PIPELINED, chunks) for chunks in (2, 3, 8))]
MESHES = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
COUNTS = {
    "ragged": [[3, 8, 0, 5], [1, 13, 4, 2], [7, 0, 1, 30], [2, 2, 9, 6]],
    "none": [[0] * 4] * 4,
    "one row": [[0, 1, 0, 0], [0] * 4, [0] * 4, [0] * 4],
    "one sender": [[0] * 4, [40, 3, 17, 9], [0] * 4, [0] * 4],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def rows_of(counts: list[int], *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(counts), *shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_same_bits(got: Tensor, expected: Tensor, what: str) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
    same = (got.contiguous().view(torch.uint8) == expected.contiguous().view(torch.uint8)).all()
    assert same, f"{what}: greatest difference {(got.double() - expected.double()).abs().max()}"


# ---- rows of nodes ----


def moved_rows(shape: tuple[int, int]) -> None:
    """Rows against what they must be: slices of what the other nodes hold, known to everyone by seed."""
    mesh = open_mesh(*shape)
    M, node = shape[0], mesh.get_local_rank("node")
    for counts in COUNTS.values():
        for way in [REDUNDANT, *WAYS]:
            exchange = NodeExchange(mesh, way)
            routes = exchange.routes(counts[node][:M])
            for dtype in [*DTYPES, torch.int64, torch.bool, torch.float8_e4m3fn]:
                for trailing in [(), (3,), (2, 5), (0,)]:
                    all_rows = [rows_of(counts[i][:M], *trailing, seed=i, dtype=dtype) for i in range(M)]
                    expected = torch.cat([all_rows[i].split(counts[i][:M])[node] for i in range(M)])
                    got = exchange.dispatch(all_rows[node], routes)
                    assert_same_bits(got, expected, f"{way} {counts} {dtype} {trailing}")
                    assert_same_bits(
                        exchange.combine(got, routes, parts=False), all_rows[node], f"{way} back"
                    )


def same_as_redundant(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A little expert layer cut over the node: outputs, input and weight gradients, bit for bit."""
    mesh = open_mesh(*shape)
    M, node = shape[0], mesh.get_local_rank("node")
    for counts in COUNTS.values():
        results = []
        for way in [REDUNDANT, *WAYS, CLUSTERS["10gbe"].with_mesh(*shape).profile()]:
            exchange = NodeExchange(mesh, way)
            routes = exchange.routes(counts[node][:M])
            x_RD = rows_of(counts[node][:M], 6, seed=node, dtype=dtype).requires_grad_()
            w_DD = rows_of([6], 6, seed=100 + dist.get_rank(), dtype=dtype).requires_grad_()
            y_RD = exchange.combine(torch.tanh(exchange.dispatch(x_RD, routes) @ w_DD), routes)
            (y_RD * rows_of(counts[node][:M], 6, seed=50 + node, dtype=dtype)).sum().backward()
            assert x_RD.grad is not None
            assert w_DD.grad is not None
            results.append((y_RD.detach(), x_RD.grad, w_DD.grad))
        for result in results[1:]:
            for what, got, expected in zip(
                ("output", "gradient", "weights"), result, results[0], strict=True
            ):
                assert_same_bits(got, expected, f"{what} of {counts}")


def against_one_process(shape: tuple[int, int]) -> None:
    """The same layer, computed from everybody's rows and weights here; tolerance: fp64 sums in another order."""
    mesh = open_mesh(*shape)
    (M, N), node = shape, mesh.get_local_rank("node")
    counts = COUNTS["ragged"]
    x_M = [rows_of(counts[i][:M], 6, seed=i, dtype=torch.float64).requires_grad_() for i in range(M)]
    w_W = [rows_of([6], 6, seed=100 + r, dtype=torch.float64).requires_grad_() for r in range(M * N)]
    to_node = [[x.split(counts[i][:M])[j] for j in range(M)] for i, x in enumerate(x_M)]
    y_M = [
        torch.cat([sum(torch.tanh(to_node[i][j] @ w_W[j * N + l]) for l in range(N)) for j in range(M)])
        for i in range(M)
    ]
    sum(
        (y * rows_of(counts[i][:M], 6, seed=50 + i, dtype=torch.float64)).sum() for i, y in enumerate(y_M)
    ).backward()
    for way in [REDUNDANT, *WAYS]:
        exchange = NodeExchange(mesh, way)
        routes = exchange.routes(counts[node][:M])
        x_RD = rows_of(counts[node][:M], 6, seed=node, dtype=torch.float64).requires_grad_()
        w_DD = rows_of([6], 6, seed=100 + dist.get_rank(), dtype=torch.float64).requires_grad_()
        y_RD = exchange.combine(torch.tanh(exchange.dispatch(x_RD, routes) @ w_DD), routes)
        (y_RD * rows_of(counts[node][:M], 6, seed=50 + node, dtype=torch.float64)).sum().backward()
        close = {"rtol": 0.0, "atol": 1e-12}
        torch.testing.assert_close(y_RD, y_M[node], **close)
        torch.testing.assert_close(x_RD.grad, x_M[node].grad, **close)
        torch.testing.assert_close(w_DD.grad, w_W[dist.get_rank()].grad, **close)


def whole_gradients() -> None:
    """Where gradients were added up before, backward only moves them; and it can be differentiated again."""
    mesh = open_mesh(2, 2)
    node = mesh.get_local_rank("node")
    counts = [row[:2] for row in COUNTS["ragged"][:2]]
    for way in [REDUNDANT, *WAYS]:
        exchange = NodeExchange(mesh, way)
        routes = exchange.routes(counts[node])
        x_RD = rows_of(counts[node], 2, seed=node, dtype=torch.float64).requires_grad_()
        y_SD = exchange.dispatch(x_RD, routes, parts_in_backward=False)
        (grad,) = torch.autograd.grad((y_SD**3).sum(), x_RD, create_graph=True)
        torch.testing.assert_close(grad, 3 * x_RD**2, rtol=1e-14, atol=0)
        (second,) = torch.autograd.grad(grad.sum(), x_RD)
        torch.testing.assert_close(second, 6 * x_RD, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_rows_arrive_as_they_are(shape: tuple[int, int], tmp_path: Path) -> None:
    run_ranks(moved_rows, shape[0] * shape[1], tmp_path, shape)


# Every type once, and every shape once: what rounds does not depend on who is where.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*(((2, 2), dtype) for dtype in DTYPES), ((2, 1), torch.float32), ((1, 4), torch.float32)],
    ids=str,
)
def test_every_strategy_is_the_redundant_one(
    shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    run_ranks(same_as_redundant, shape[0] * shape[1], tmp_path, shape, dtype)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (1, 4)], ids=str)
def test_gradients_of_one_process(shape: tuple[int, int], tmp_path: Path) -> None:
    run_ranks(against_one_process, shape[0] * shape[1], tmp_path, shape)


def test_gradients_that_are_whole(tmp_path: Path) -> None:
    run_ranks(whole_gradients, 4, tmp_path)


# ---- a token once a node ----


def once_a_node() -> None:
    """Four experts on two nodes, top-2, weights along: the layer equals the one where nothing is exchanged."""
    mesh = open_mesh(2, 2)
    node, local = mesh.get_local_rank("node"), mesh.get_local_rank("local")
    T, E, D = 11, 4, 6
    generator = torch.Generator().manual_seed(node)
    x_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
    ids_TK = torch.rand(T, E, generator=generator).topk(2).indices
    weights_TK = torch.rand(T, 2, generator=generator, dtype=torch.float64)
    w_EDD = torch.randn(E, D, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    node_of_expert_E = torch.tensor([0, 1, 0, 1])

    def layer(x: Tensor, ids: Tensor, weights: Tensor, part: slice, mine: Tensor) -> Tensor:
        """Each expert is tanh on a slice of its columns, so slices of the output add up."""
        y = torch.zeros_like(x)
        for e in range(E):
            on = ((ids == e) * weights).sum(1, keepdim=True) * mine[e]
            y[:, part] += on * torch.tanh(x @ w_EDD[e][:, part])
        return y

    expected = [t.clone().requires_grad_() for t in (x_TD, weights_TK)]
    y = layer(expected[0], ids_TK, expected[1], slice(0, D), torch.ones(E))
    y.square().sum().backward()
    exchange = NodeExchange(mesh, Way(Strategy.PIPELINED, 2))
    got = [t.clone().requires_grad_() for t in (x_TD, weights_TK)]
    rows = rows_by_node(ids_TK, node_of_expert_E, 2)
    assert sum(rows.counts) < 2 * T
    routes = exchange.routes(rows.counts)
    x_SD, ids_SK, weights_SK = (exchange.dispatch(t[rows.token_R], routes) for t in (got[0], ids_TK, got[1]))
    part = slice(local * D // 2, (local + 1) * D // 2)
    y_RD = exchange.combine(
        layer(x_SD, ids_SK, weights_SK, part, (node_of_expert_E == node).double()), routes
    )
    y_TD = torch.zeros_like(x_TD).index_add(0, rows.token_R, y_RD)
    y_TD.square().sum().backward()
    torch.testing.assert_close(y_TD, y, rtol=0, atol=1e-12)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_a_token_goes_to_a_node_once(tmp_path: Path) -> None:
    run_ranks(once_a_node, 4, tmp_path)


# ---- rows of ranks ----


def between_ranks(shape: tuple[int, int]) -> None:
    mesh = open_mesh(*shape)
    W, rank = shape[0] * shape[1], dist.get_rank()
    for counts in COUNTS.values():
        for hierarchical in (False, True):
            exchange = RankExchange(mesh, hierarchical)
            routes = exchange.routes(counts[rank][:W])
            for dtype in (torch.float32, torch.bfloat16, torch.int64):
                all_rows = [rows_of(counts[i][:W], 3, seed=i, dtype=dtype) for i in range(W)]
                expected = torch.cat([all_rows[i].split(counts[i][:W])[rank] for i in range(W)])
                assert_same_bits(
                    exchange.dispatch(all_rows[rank], routes), expected, f"{hierarchical} {counts}"
                )
                assert_same_bits(exchange.combine(expected, routes), all_rows[rank], "back")
            x_RD = rows_of(counts[rank][:W], 3, seed=rank).requires_grad_()
            (exchange.combine(exchange.dispatch(x_RD, routes) ** 2, routes) * x_RD).sum().backward()
            torch.testing.assert_close(x_RD.grad, 3 * x_RD.detach() ** 2)
    for T in (0, 1, 7):
        x_TD = rows_of([T], 3, seed=mesh.get_local_rank("node")).requires_grad_()
        y_TD = gather_shares(drop_to_share(x_TD, mesh) ** 2, mesh, T)
        assert_same_bits(y_TD.detach(), x_TD.detach() ** 2, "shares")
        y_TD.sum().backward()
        assert_same_bits(x_TD.grad, 2 * x_TD.detach(), "gradient of shares")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_hierarchical_is_the_plain_exchange(shape: tuple[int, int], tmp_path: Path) -> None:
    run_ranks(between_ranks, shape[0] * shape[1], tmp_path, shape)


# ---- faults ----


def says(expected: type[Exception], call: Any) -> str:
    with pytest.raises(expected) as caught:
        call()
    return str(caught.value)


def disagreeing(what: str) -> str:
    rank = dist.get_rank()
    if what == "mesh":
        return says(ValueError, lambda: open_mesh(*((2, 2) if rank < 3 else (4, 1))))
    if what == "size":
        return says(ValueError, lambda: open_mesh(3, 2))
    mesh = open_mesh(2, 2)
    if what == "way":
        return says(ValueError, lambda: NodeExchange(mesh, Way(Strategy.PIPELINED, 4 if rank else 2)))
    if what == "profile":
        return says(ValueError, lambda: NodeExchange(mesh, CLUSTERS["10gbe"].profile()))
    exchange = NodeExchange(mesh, Way(Strategy.DROP_GATHER))
    return says(ValueError, lambda: exchange.routes([1, 2 + rank % 2]))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("mesh", r"open_mesh: ranks disagree: rank 0 has .*2 nodes.* rank 3 has .*4 nodes.*same arguments"),
        ("size", r"open_mesh: 3 nodes of 2 ranks are 6 ranks, torchrun started 4"),
        ("way", r"NodeExchange: ranks disagree: rank 0 has .*\"chunks\": 2.* rank 1 has .*\"chunks\": 4"),
        ("profile", r"network profile is of 2x4 ranks, the mesh is 2x2; measure"),
        ("rows", r"rank 1 sends \[1, 3\] rows to the nodes, rank 0 of the same node \[1, 2\]"),
    ],
)
def test_ranks_that_disagree_all_say_so(what: str, message: str, tmp_path: Path) -> None:
    answers = run_ranks(disagreeing, 4, tmp_path, what)
    assert len(set(answers)) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(answers[0])


TIMEOUT_S = 4.0


def one_rank_leaves(way: Way, how: str) -> tuple[str, float]:
    """Rank 3 dies or stalls between the first and the second exchange; what the others say, and after how long."""
    mesh = open_mesh(2, 2, timeout_s=TIMEOUT_S)
    exchange = NodeExchange(mesh, way)
    routes = exchange.routes([5, 5])
    x_RD = torch.ones(10, 1000, requires_grad=True)
    exchange.dispatch(x_RD, routes)
    if dist.get_rank() == 3:
        if how == "stalls":
            time.sleep(3 * TIMEOUT_S)
        os._exit(1)
    start_s = time.monotonic()

    def steps() -> None:
        for _ in range(3):
            exchange.combine(exchange.dispatch(x_RD, routes), routes).sum().backward()

    return says(ExchangeFailed, steps), time.monotonic() - start_s


@pytest.mark.parametrize("how", ["dies", "stalls"])
@pytest.mark.parametrize("way", [REDUNDANT, Way(Strategy.DROP_GATHER), Way(Strategy.PIPELINED, 4)], ids=str)
def test_a_rank_that_leaves_is_an_error_on_all_others_in_time(way: Way, how: str, tmp_path: Path) -> None:
    """One time limit for the rank that waits for it, another for one that waits for that rank in turn."""
    answers = run_ranks(one_rank_leaves, 4, tmp_path, way, how, may_die=(3,), deadline_s=40.0)
    for message, seconds_s in answers[:3]:
        assert "did not hear from another rank" in message
        assert "\n" not in message
        assert seconds_s < 2 * TIMEOUT_S + 2


def absent_from_agreement() -> str:
    if dist.get_rank() == 1:
        time.sleep(8)
        return ""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    return says(ExchangeFailed, lambda: agree("here", "a test"))


def test_a_rank_that_never_comes_is_an_error(tmp_path: Path) -> None:
    answers = run_ranks(absent_from_agreement, 2, tmp_path)
    assert "a test: agreeing: rank 0 did not hear from another rank" in answers[0]


def test_refused() -> None:
    with pytest.raises(ValueError, match="2 or more chunks"):
        Way(Strategy.PIPELINED)
    with pytest.raises(ValueError, match="expected one of"):
        Way(Strategy.SHARDING)
