"""A layer's tasks: every pair is computed once, lanes are as busy as the split says, buffers are never filled too early."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monde.planning.cost import CostModel, ExpertShape
from monde.planning.machines import DESCRIBED
from monde.planning.prefill_schedule import (
    Arriving,
    Combine,
    Fetch,
    Multiply,
    OnHost,
    Place,
    Residents,
    prefill_schedule,
)
from monde.planning.schedule import Resource, Schedule
from monde.planning.simulate import simulate
from monde.planning.split import ExpertSplit, Load, Where
from monde.planning.split_policies import SPLIT_POLICIES
from monde.planning.staging import Piece, Staging

SHAPE = ExpertShape(2048, 768)
COST = CostModel(DESCRIBED["h200"], SHAPE)


@dataclass(frozen=True)
class Case:
    load: Load
    split: ExpertSplit
    slot_E: np.ndarray
    staged: list[tuple[Piece, ...]]
    staging: Staging

    @property
    def schedule(self) -> Schedule:
        return prefill_schedule(self.load, self.split, COST, self.staging, self.slot_E, self.staged)


@st.composite
def cases(draw: st.DrawFn, whole: bool) -> Case:
    """Experts idle, in slots, fetched ahead, both (their slot came later), and cold."""
    n = draw(st.integers(1, 24))
    tokens_E = np.array(draw(st.lists(st.sampled_from([0, 1, 7, 200, 900]), min_size=n, max_size=n)))
    slot_E = np.array([draw(st.integers(0, 99)) * 100 + e if draw(st.booleans()) else -1 for e in range(n)])
    per_buffer = draw(st.integers(1, 4)) if whole else 1
    ahead = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=2 * per_buffer)) if whole else []
    staging = Staging(768 if whole else 256, per_buffer, 2)
    staged = staging.loads(ahead, 768)
    ready_E = slot_E >= 0
    ready_E[ahead] = True
    busy_s = draw(st.sampled_from([0.0, 1e-4, 1e-3])) if staged else 0.0
    load = Load(tokens_E, ready_E, 900, 64, busy_s)
    split = SPLIT_POLICIES[draw(st.sampled_from(sorted(SPLIT_POLICIES)))](load, COST)
    return Case(load, split, slot_E, staged, staging)


@settings(max_examples=200, deadline=None)
@given(st.booleans().flatmap(lambda whole: cases(whole)))
def test_every_row_of_every_expert_is_computed_once(case: Case) -> None:
    rows_EF = np.zeros((len(case.slot_E), 768), int)
    tasks = case.schedule.tasks
    placed: list[int] = []
    for task in tasks:
        match task.payload:
            case Residents(experts):
                rows_EF[experts] += 1
                assert (np.diff(case.slot_E[experts]) > 0).all()
            case Multiply(places, pieces):
                source = tasks[task.after[0]].payload
                held = case.staged[source.idx] if isinstance(source, Arriving) else None
                held = source.pieces if isinstance(source, Fetch) else held
                assert held is not None
                assert tuple(held[i] for i in places) == pieces
                for piece in pieces:
                    rows_EF[piece.expert_id, piece.first_row : piece.first_row + piece.num_rows] += 1
            case OnHost(on_host_E, cut_expert, cut_rows):
                rows_EF[on_host_E] += 1
                if cut_expert is not None:
                    rows_EF[cut_expert, :cut_rows] -= 1
            case Place(experts):
                placed = experts.tolist()
    assert (rows_EF == (case.load.tokens_E > 0)[:, None]).all()
    on_device = set(np.flatnonzero(np.isin(case.split.where_E, (Where.RESIDENT, Where.FETCHED))).tolist())
    if case.split.cut_expert is not None:
        on_device.add(case.split.cut_expert)
    assert sorted(placed) == sorted(on_device)
    assert isinstance(tasks[-1].payload, Combine)
    assert set(tasks[-1].after) == {i for i, t in enumerate(tasks[:-1]) if t.resource is not Resource.PCIE_UP}


@settings(max_examples=100, deadline=None)
@given(cases(whole=True))
def test_resources_are_as_busy_as_the_split_says(case: Case) -> None:
    busy_s = case.schedule.busy_s
    assert busy_s.get(Resource.PCIE_UP, 0.0) == pytest.approx(_copied_s(case), rel=1e-9, abs=1e-15)
    assert busy_s[Resource.GPU] == pytest.approx(case.split.gemm_s, rel=1e-9, abs=1e-15)
    assert busy_s.get(Resource.HOST, 0.0) == pytest.approx(case.split.host_s, rel=1e-9, abs=1e-15)


def _copied_s(case: Case) -> float:
    """The bus is not longer busy with what was fetched ahead than fetching it takes."""
    ahead_s = sum(len(pieces) for pieces in case.staged) * float(COST.copy_s())
    return case.split.copy_s - case.load.bus_busy_s + min(case.load.bus_busy_s, ahead_s)


@settings(max_examples=100, deadline=None)
@given(st.booleans().flatmap(lambda whole: cases(whole)))
def test_two_buffers_take_turns(case: Case) -> None:
    """The simulated timeline is that of a loop over buffers: filled when read, read when filled."""
    schedule = case.schedule
    timeline = simulate(schedule)
    incoming = [t.seconds_s for t in schedule.tasks if isinstance(t.payload, Arriving | Fetch)]
    products = [t.seconds_s for t in schedule.tasks if isinstance(t.payload, Multiply)]
    residents_s = sum(t.seconds_s for t in schedule.tasks if isinstance(t.payload, Residents))
    bus_s, gpu_s = 0.0, case.split.launch_s
    read_s: list[float] = []
    for i, copy_s in enumerate(incoming):
        lead_s = case.split.lead_s if i >= len(case.staged) else 0.0
        bus_s = max(bus_s, lead_s, read_s[i - 2] if i >= 2 else 0.0) + copy_s
        gpu_s += residents_s if i == len(case.staged) else 0.0
        gpu_s = max(gpu_s, bus_s) + products[i]
        read_s.append(gpu_s)
    gpu_s += residents_s if len(incoming) == len(case.staged) else 0.0
    assert timeline.makespan_s == pytest.approx(max(gpu_s, bus_s, case.split.host_s), rel=1e-9)


def test_the_most_loaded_leave_first_and_neighbours_together() -> None:
    tokens_E = np.array([5, 900, 1, 800, 700, 600])
    where_E = np.array([Where.FETCHED] * 5 + [Where.HOST], np.int8)
    load, slot_E = Load(tokens_E, np.zeros(6, bool), 900, 64), np.full(6, -1)
    split = ExpertSplit(where_E, 5, 128, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    schedule = prefill_schedule(load, split, COST, Staging(768, 2, 2), slot_E)
    fetched = [
        tuple(p.expert_id for p in t.payload.pieces) for t in schedule.tasks if isinstance(t.payload, Fetch)
    ]
    assert fetched == [(1, 3), (0, 4), (2,), (5,)]
    assert [type(t.payload).__name__ for t in schedule.tasks] == [
        *(
            "Fetch",
            "OnHost",
            "Fetch",
            "Place",
            "Multiply",
            "Fetch",
            "Multiply",
            "Fetch",
            "Multiply",
            "Multiply",
        ),
        "Combine",
    ]
