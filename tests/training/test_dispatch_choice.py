"""A profile says roughly which way is the soonest; what is tried with the exchange's own rows decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from monde.device.mesh import open_mesh
from monde.planning.exchange import REPLICATED, Exchange, exchange_s, exchanges, with_measured
from monde.planning.network_profile import CLUSTERS, NetworkProfile
from monde.training import dispatch_choice
from monde.training.dispatch import NodeExchange, Way
from monde.training.dispatch_choice import MOST_SIZES, Chooser
from tests.distributed.ranks import run_ranks

NETWORK = CLUSTERS["10gbe"].profile()
ROWS_BYTES = 1 << 20
Key = tuple[str, int]


class Tried:
    """Stands in for `in_turn`: every way takes what `truth_s` says. Remembers what was tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, truth_s: Callable[[Exchange], float]) -> None:
        self.turns: list[list[Key]] = []
        self._truth_s = truth_s
        self._ran: list[Exchange] = []
        monkeypatch.setattr(dispatch_choice, "in_turn", self._in_turn)

    def run(self, one: Exchange) -> None:
        self._ran.append(one)

    def _in_turn(self, steps: Sequence[Callable[[], object]], *_: object) -> list[list[float]]:
        self._ran = []
        for step in steps:
            step()
        self.turns.append([(one.strategy, one.chunks) for one in self._ran])
        return [[self._truth_s(one)] for one in self._ran]


def chooser() -> Chooser:
    return Chooser(NETWORK, torch.device("cpu"))


def settled(one: Chooser, tried: Tried, rows: int = ROWS_BYTES, adds: bool = False) -> Key:
    one.settle(rows, rows, adds, tried.run)
    best = one.best(rows, rows, adds)
    return best.strategy, best.chunks


def test_of_ways_that_are_predicted_close_the_measured_one_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = exchanges(NETWORK, ROWS_BYTES, ROWS_BYTES, False)
    near = [e for e in planned if e.seconds_s <= 1.4 * planned[0].seconds_s]
    assert 1 < len(near) < len(planned), "the example has ways that are close and ways that are not"
    last = near[-1]
    tried = Tried(monkeypatch, lambda e: e.seconds_s * (0.9 if e == last else 1.5))
    assert settled(chooser(), tried) == (last.strategy, last.chunks)
    assert tried.turns == [[(e.strategy, e.chunks) for e in near]]


def test_a_way_that_only_looks_soonest_now_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that were tried take ten times as long as predicted: another is then predicted best, and is no better."""
    tried = Tried(
        monkeypatch, lambda e: 10 * exchange_s(NETWORK, ROWS_BYTES, ROWS_BYTES, False, e.strategy, e.chunks)
    )
    planned = exchanges(NETWORK, ROWS_BYTES, ROWS_BYTES, False)
    assert settled(chooser(), tried) == (planned[0].strategy, planned[0].chunks)
    assert {key for turn in tried.turns for key in turn} == set(REPLICATED)


def test_a_size_is_tried_once_and_so_many_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Tried(monkeypatch, lambda e: e.seconds_s)
    one = chooser()
    for adds in (False, True):
        for size in (ROWS_BYTES, ROWS_BYTES, int(1.05 * ROWS_BYTES)):
            settled(one, tried, size, adds)
    assert len(tried.turns) == 2
    for i in range(40):
        settled(one, tried, int(1000 * 1.3**i))
    assert len(one._timed[False]) == MOST_SIZES
    turns = len(tried.turns)
    settled(one, tried, 0)
    assert len(tried.turns) == turns


@given(
    st.lists(st.floats(1e-6, 10), min_size=1, max_size=6),
    st.integers(1, 1 << 30),
    st.floats(1, 4),
    st.booleans(),
)
def test_what_was_measured_is_what_is_predicted(
    seconds: list[float], away_bytes: int, stay: float, adds: bool
) -> None:
    rows_bytes = away_bytes * stay
    took = [Exchange(s, c, t) for (s, c), t in zip(REPLICATED, seconds, strict=False)]
    before = exchanges(NETWORK, rows_bytes, away_bytes, adds)
    network = with_measured(NETWORK, rows_bytes, away_bytes, adds, took)
    expected = {(e.strategy, e.chunks): e.seconds_s for e in (*before, *took)}
    for e in exchanges(network, rows_bytes, away_bytes, adds):
        assert e.seconds_s == pytest.approx(expected[e.strategy, e.chunks], rel=1e-6)
    assert exchanges(network, rows_bytes, away_bytes, not adds) == exchanges(
        NETWORK, rows_bytes, away_bytes, not adds
    )
    again = with_measured(network, rows_bytes, away_bytes, adds, took)
    assert {len(way.away_bytes) for way in again.ways} == {1}


def tries(network: NetworkProfile) -> tuple[NetworkProfile, Way]:
    mesh = open_mesh(2, 2)
    exchange, plain = NodeExchange(mesh, network), NodeExchange(mesh, Way(*REPLICATED[0]))
    node = mesh.get_local_rank("node")
    routes = exchange.routes([300 + node, 200])
    x_RD = torch.randn(routes.num_sent, 64, generator=torch.Generator().manual_seed(node)).requires_grad_()
    for one in (exchange, plain):  # tries ways forward and backward on the first call of the first
        y_SD = one.dispatch(x_RD, routes)
        back_RD = one.combine(y_SD, routes)
        back_RD.square().sum().backward()
        if one is exchange:
            first, gradient, x_RD.grad = back_RD.detach(), x_RD.grad, None
    assert torch.equal(first, back_RD)
    assert torch.equal(gradient, x_RD.grad)
    assert isinstance(exchange._way, Chooser)
    dist.barrier()
    return exchange._way.network, exchange.way_of(routes, 256, False)


def test_ranks_agree_on_what_they_tried(tmp_path: Path) -> None:
    """And all ways tried give the rows of the plain one, gradients too."""
    network = replace(NETWORK, ranks_per_node=2)
    answers = run_ranks(tries, 4, tmp_path, network)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0].ways, "nothing was tried"
