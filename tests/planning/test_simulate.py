"""The simulator against longest paths, clocks that tick in small steps, and the cost model's own formula."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monde.planning.cost import CostModel, ExpertShape, overlapped_s
from monde.planning.machines import DESCRIBED
from monde.planning.profile import Overlap
from monde.planning.schedule import Resource, Schedule, ScheduleBuilder, Task
from monde.planning.simulate import Timeline, contention_of, simulate

overlaps = st.builds(Overlap, st.floats(1, 2), st.floats(1, 2))
PAIRS = [(a, b) for a in Resource for b in Resource if list(Resource).index(a) < list(Resource).index(b)]


@st.composite
def schedules(draw: st.DrawFn, max_tasks: int = 8) -> Schedule:
    tasks = []
    for i in range(draw(st.integers(0, max_tasks))):
        after = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        seconds_s = draw(st.integers(0, 5) | st.floats(0.01, 5))
        tasks.append(Task(f"t{i}", draw(st.sampled_from(Resource)), float(seconds_s), tuple(after)))
    return Schedule(tuple(tasks))


contentions = st.dictionaries(st.sampled_from(PAIRS), overlaps, max_size=5)


def longest_path_s(schedule: Schedule, i: int) -> float:
    """End of task i by trying every chain of waiting that leads to it: dependencies and the task before it."""
    task = schedule.tasks[i]
    before = [j for j in range(i) if schedule.tasks[j].resource is task.resource][-1:]
    return task.seconds_s + max((longest_path_s(schedule, j) for j in (*task.after, *before)), default=0.0)


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_without_contention_it_is_the_longest_path(schedule: Schedule) -> None:
    timeline = simulate(schedule)
    for span in timeline.spans:
        assert span.end_s == pytest.approx(longest_path_s(schedule, span.task_idx), abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(schedules(), contentions)
def test_bounds_and_order(schedule: Schedule, contention: dict[tuple[Resource, Resource], Overlap]) -> None:
    timeline = simulate(schedule, contention)
    makespan_s = timeline.makespan_s
    assert makespan_s >= schedule.critical_path_s - 1e-9
    for resource, busy_s in schedule.busy_s.items():
        assert timeline.busy_s(resource) >= busy_s - 1e-9
        assert makespan_s >= busy_s - 1e-9
        spans = [s for s in timeline.spans if s.resource is resource]
        for a, b in itertools.pairwise(spans):
            assert b.start_s >= a.end_s - 1e-12  # one at a time, in order
    for span, task in zip(timeline.spans, schedule.tasks, strict=True):
        assert span.end_s - span.start_s >= task.seconds_s - 1e-9
        assert all(span.start_s >= timeline.spans[before].end_s - 1e-12 for before in task.after)


def ticking(
    schedule: Schedule, contention: dict[tuple[Resource, Resource], Overlap], tick_s: float
) -> list[float]:
    """Ends of all tasks by advancing everything that can run by a small step, over and over."""
    left = [task.seconds_s for task in schedule.tasks]
    end_s: list[float | None] = [None] * len(left)
    clock_s = 0.0
    while None in end_s:
        running: dict[Resource, int] = {}
        for i, task in enumerate(schedule.tasks):
            first = all(end_s[j] is not None for j in range(i) if schedule.tasks[j].resource is task.resource)
            if end_s[i] is None and first and all(end_s[j] is not None for j in task.after):
                running.setdefault(task.resource, i)
        clock_s += tick_s
        for resource, i in running.items():
            slow = 1.0
            for other in running:
                if (resource, other) in contention:
                    slow *= contention[resource, other].first
                if (other, resource) in contention:
                    slow *= contention[other, resource].second
            left[i] -= tick_s / slow
            if left[i] <= 0:
                end_s[i] = clock_s
    return [e for e in end_s if e is not None]


@settings(max_examples=30, deadline=None)
@given(schedules(max_tasks=4), contentions)
def test_a_ticking_clock_agrees(
    schedule: Schedule, contention: dict[tuple[Resource, Resource], Overlap]
) -> None:
    timeline = simulate(schedule, contention)
    tick_s = 0.005
    for span, end_s in zip(timeline.spans, ticking(schedule, contention, tick_s), strict=True):
        assert span.end_s == pytest.approx(end_s, abs=len(timeline.spans) * 8 * tick_s)


@given(st.floats(0.1, 5), st.floats(0.1, 5), overlaps)
def test_two_tasks_take_what_the_cost_model_says(a_s: float, b_s: float, overlap: Overlap) -> None:
    schedule = Schedule((Task("a", Resource.HOST, a_s), Task("b", Resource.PCIE_UP, b_s)))
    timeline = simulate(schedule, {(Resource.HOST, Resource.PCIE_UP): overlap})
    assert timeline.makespan_s == pytest.approx(float(overlapped_s(a_s, b_s, overlap)))


@pytest.mark.parametrize("down_gb", [0.0, 5.06, 50.6])
def test_copies_both_ways_slow_each_other(down_gb: float) -> None:
    """As measured: 55.4 GB/s one way, 50.6 each way; what is left when the other ends runs at full speed."""
    tasks = (
        Task("up", Resource.PCIE_UP, 50.6 / 55.4),
        Task("down", Resource.PCIE_DOWN, down_gb / 55.4),
    )
    up, down = simulate(Schedule(tasks), contention_of(DESCRIBED["h200"])).spans
    both_s = down_gb / 50.6
    assert down.end_s == pytest.approx(both_s)
    assert up.end_s == pytest.approx(both_s + (50.6 - down_gb) / 55.4)


def three_fetches() -> Timeline:
    """Copies run ahead of the products that need them: double buffering in three lines."""
    cost = CostModel(DESCRIBED["h200"], ExpertShape(2048, 768))
    builder = ScheduleBuilder()
    for e in range(3):
        copied = builder.add(f"copy {e}", Resource.PCIE_UP, float(cost.copy_s()))
        builder.add(f"expert {e}", Resource.GPU, float(cost.resident_s(64)), [copied])
    return simulate(builder.build(), contention_of(cost.profile))


def test_copies_hide_products() -> None:
    cost = CostModel(DESCRIBED["h200"], ExpertShape(2048, 768))
    assert three_fetches().makespan_s == pytest.approx(3 * cost.copy_s() + cost.resident_s(64), rel=0.02)


def test_chrome_trace_is_json_with_a_row_per_resource() -> None:
    timeline = three_fetches()
    trace = json.loads(json.dumps(timeline.to_chrome_trace("three fetches")))
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    rows = {e["args"]["name"]: e["tid"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert set(rows) == {"pcie up", "gpu"}
    assert [e["name"] for e in spans if e["tid"] == rows["gpu"]] == ["expert 0", "expert 1", "expert 2"]
    assert max(e["ts"] + e["dur"] for e in spans) == pytest.approx(timeline.makespan_s * 1e6)


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="only come after earlier tasks"):
        Schedule((Task("a", Resource.GPU, 1.0, (0,)),))
    with pytest.raises(ValueError, match="seconds >= 0"):
        Schedule((Task("a", Resource.GPU, float("nan")),))


def test_nothing_takes_no_time() -> None:
    assert simulate(Schedule(())).makespan_s == 0
