"""The executor does what the schedule says that the simulator is given, and nothing else, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from hostcompute import Cut, ExpertSpec
from monde.executors.prefill import PrefillExecutor
from monde.executors.waves import Order, Wave
from monde.planning.prefill_schedule import Fetch, Multiply, OnHost, Place, Residents, prefill_schedule
from monde.planning.schedule import Schedule
from monde.planning.simulate import simulate
from monde.planning.staging import Piece
from tests.hostcompute.cases import make_batch
from tests.monde.prefill_layers import POLICIES, Layers, build, routed

pytest.importorskip("hostcompute._native")

CPU = torch.device("cpu")
Done = tuple[Any, ...]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monde.executors.prefill_size.BUFFER_BYTES", 40_000)
    monkeypatch.setattr("monde.executors.prefill_size.SCRATCH_BYTES", 60_000)


@contextmanager
def watched(layers: Layers, executor: PrefillExecutor) -> Iterator[list[Done]]:
    """What is asked of copies, host and products, at their own doors, as (kind, what)."""
    hub, done, order = layers.hub, list[Done](), list[Order]()
    products = executor.device.products(torch.bfloat16)
    buffers = {hub.ring._buffers_BB[i].data_ptr(): i for i in range(hub.ring.num_buffers)}
    with pytest.MonkeyPatch.context() as patch:

        def watch(owner: Any, name: str, see: Any) -> None:
            call = getattr(owner, name)
            patch.setattr(owner, name, lambda *args: (see(*args), call(*args))[1])

        def multiplied(wave: Wave, _tiles: Any, packed: Any, *_: Any) -> None:
            experts = [int(np.flatnonzero(order[0].begin_E == begin)[-1]) for begin in wave.begins_n]
            pieces = [(e, wave.first_row, wave.num_rows) for e in experts]
            done.append(("multiply", buffers.get(packed.blobs_B.data_ptr()), pieces))

        watch(hub.ring, "fetch", lambda _blobs, pieces, *_: done.append(("fetch", _plain(pieces))))
        watch(
            hub.host,
            "submit",
            lambda _bank, _posted, mine_E, cut=None: done.append(("host", mine_E.tolist(), cut)),
        )
        watch(
            executor.device, "place", lambda _schedule, its, *_: (order.append(its), done.append(("place",)))
        )
        watch(products, "multiply", multiplied)
        watch(executor.device, "combine", lambda *_: done.append(("combine",)))
        yield done


def _plain(pieces: tuple[Piece, ...]) -> list[tuple[int, int, int]]:
    return [(piece.expert_id, piece.first_row, piece.num_rows) for piece in pieces]


def expected(schedule: Schedule, first_buffer: int, executor: PrefillExecutor) -> list[Done]:
    """The same of a schedule. Shipments fill the two buffers in turn."""
    assert executor.latest is not None
    done, brought, begun_E = list[Done](), 0, executor.latest.load.begun_E
    if begun_E is not None:
        done.append(("host", begun_E.tolist(), None))
    for task in schedule.tasks:
        match task.payload:
            case Fetch(pieces):
                done.append(("fetch", _plain(pieces)))
            case OnHost(on_host_E, cut_expert, cut_rows):
                cut = None if cut_expert is None else Cut(cut_expert, cut_rows)
                if on_host_E.any():
                    done.append(("host", on_host_E.tolist(), cut))
            case Place():
                done.append(("place",))
            case Residents(experts):
                step, F = executor.size.piece_rows, executor.spec.d_ffn
                at_once = executor.size.num_unpacked if executor.is_whole else 1
                for i in range(0, len(experts), at_once):
                    for row in range(0, F, step):
                        its = [(int(e), row, min(step, F - row)) for e in experts[i : i + at_once]]
                        done.append(("multiply", None, its))
            case Multiply(_, pieces):
                if pieces:
                    done.append(("multiply", (first_buffer + brought) % 2, _plain(pieces)))
                brought += 1
    return [*done, ("combine",)]


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("d_ffn", [96, 330])  # whole in a buffer, in pieces
def test_what_is_done_is_what_is_simulated(policy: str, d_ffn: int) -> None:
    rng = np.random.default_rng([len(policy), d_ffn])
    spec = ExpertSpec(8, 64, d_ffn)
    residents = [rng.permutation(8)[: rng.integers(0, 6)].tolist() for _ in range(3)]
    layers = build([spec] * 3, residents, CPU, POLICIES[policy], seed=d_ffn)
    layers.hub.begins = True
    num_ahead = 0
    for round_idx in range(15):
        executor = layers.executors[round_idx % 3]
        batch = make_batch(rng, spec, int(rng.integers(1, 200)), int(rng.integers(1, 5)), "bf16")
        before = layers.hub.ring._next
        with watched(layers, executor) as done:
            executor.forward(routed(batch, CPU))
        plan = executor.latest
        assert plan is not None
        cost = layers.hub.cost(executor.shape)
        schedule = prefill_schedule(
            plan.load, plan.split, cost, executor.size.staging, plan.slot_E, plan.staged
        )
        assert simulate(schedule).makespan_s > 0
        in_order = done[: done.index(("combine",)) + 1]
        assert in_order == expected(schedule, before - len(plan.staged), executor), round_idx
        assert all(kind == "fetch" for kind, *_ in done[len(in_order) :])  # ahead, for the next layer
        num_ahead += len(plan.staged)
    assert (num_ahead > 0) == (d_ffn == 96)
    layers.close()
