"""A schedule on a machine whose resources disturb each other: when every task starts and ends.

Between events the set of running tasks is constant; a task advances at 1 / (product of the slow-downs that the other
running resources inflict on its own, as far as both tasks use memory). Events are ends of tasks, so the timeline is exact, not sampled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from monde.planning.profile import HardwareProfile, Overlap
from monde.planning.schedule import Resource, Schedule, Task

Contention = Mapping[tuple[Resource, Resource], Overlap]

# Work below this share of a task counts as done: two ends that rounding sets apart are one event.
_DONE = 1e-12


@dataclass(frozen=True)
class Span:
    """One task of the schedule on the clock."""

    task_idx: int
    name: str
    resource: Resource
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """Spans in the order of the schedule's tasks."""

    spans: tuple[Span, ...]

    @property
    def makespan_s(self) -> float:
        return max((span.end_s for span in self.spans), default=0.0)

    def busy_s(self, resource: Resource) -> float:
        return sum(span.end_s - span.start_s for span in self.spans if span.resource is resource)

    def to_chrome_trace(self, process: str = "monde") -> dict[str, Any]:
        """What chrome://tracing and Perfetto read: a row per resource, times in microseconds."""
        rows = [r for r in Resource if any(span.resource is r for span in self.spans)]
        names: list[dict[str, Any]] = [
            {"ph": "M", "pid": 0, "tid": 0, "name": "process_name", "args": {"name": process}},
            *(
                {"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": r.value}}
                for tid, r in enumerate(rows)
            ),
        ]
        spans = [
            {
                "ph": "X",
                "pid": 0,
                "tid": rows.index(span.resource),
                "name": span.name,
                "ts": span.start_s * 1e6,
                "dur": (span.end_s - span.start_s) * 1e6,
            }
            for span in self.spans
        ]
        return {"traceEvents": names + spans, "displayTimeUnit": "ms"}


def contention_of(profile: HardwareProfile) -> dict[tuple[Resource, Resource], Overlap]:
    """Which pairs of a machine's resources slow each other, and how much; copies in either direction slow the others alike."""
    if profile.gpu is None:
        return {}
    return {
        (Resource.HOST, Resource.PCIE_UP): profile.gpu.host_while_copying,
        (Resource.HOST, Resource.PCIE_DOWN): profile.gpu.host_while_copying,
        (Resource.GPU, Resource.PCIE_UP): profile.gpu.gpu_while_copying,
        (Resource.GPU, Resource.PCIE_DOWN): profile.gpu.gpu_while_copying,
        (Resource.PCIE_UP, Resource.PCIE_DOWN): profile.gpu.up_while_down,
    }


def simulate(schedule: Schedule, contention: Contention | None = None) -> Timeline:
    """The timeline of `schedule`; pairs not in `contention` do not disturb each other."""
    slow = _both_ways(contention or {})
    queues: dict[Resource, deque[int]] = {}
    for i, task in enumerate(schedule.tasks):
        queues.setdefault(task.resource, deque()).append(i)
    start_s = [0.0] * len(schedule.tasks)
    end_s: list[float | None] = [None] * len(schedule.tasks)
    left_s: dict[int, float] = {}  # of running tasks, alone on the machine
    clock_s = 0.0
    while any(queues.values()):
        for queue in queues.values():
            ready = queue and all(end_s[before] is not None for before in schedule.tasks[queue[0]].after)
            if ready and queue[0] not in left_s:
                left_s[queue[0]] = schedule.tasks[queue[0]].seconds_s
                start_s[queue[0]] = clock_s
        running = [schedule.tasks[i] for i in left_s]
        pace = {i: prod(_slow_down(schedule.tasks[i], other, slow) for other in running) for i in left_s}
        step_s = min(left_s[i] * pace[i] for i in left_s)
        clock_s += step_s
        for i in list(left_s):
            left_s[i] -= step_s / pace[i]
            if left_s[i] <= _DONE * schedule.tasks[i].seconds_s:
                del left_s[i]
                end_s[i] = clock_s
                queues[schedule.tasks[i].resource].popleft()
    return Timeline(
        tuple(
            Span(i, task.name, task.resource, start_s[i], _ended(end_s[i]))
            for i, task in enumerate(schedule.tasks)
        )
    )


def _slow_down(task: Task, other: Task, slow: Mapping[tuple[Resource, Resource], float]) -> float:
    return 1 + (slow.get((task.resource, other.resource), 1.0) - 1) * task.memory_share * other.memory_share


def _both_ways(contention: Contention) -> dict[tuple[Resource, Resource], float]:
    """slow[a, b]: how many times longer a takes while b runs."""
    slow = {}
    for (a, b), overlap in contention.items():
        assert a is not b, "a resource runs one task at a time"
        slow[a, b], slow[b, a] = overlap.first, overlap.second
    return slow


def _ended(end_s: float | None) -> float:
    assert end_s is not None
    return end_s
