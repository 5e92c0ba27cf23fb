"""What happens when: tasks on resources, in the order in which they are issued.

A resource is a stream: it runs one task at a time, in the order of the schedule. A task starts when its resource is
free and everything it comes after has ended. The same records are simulated and executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class Resource(StrEnum):
    HOST = "host"
    PCIE_UP = "pcie up"  # host to device
    PCIE_DOWN = "pcie down"
    GPU = "gpu"
    LAUNCHES = "launches"  # Python
    LINK_INTRA = "link in the node"
    LINK_INTER = "link between nodes"


class Task(NamedTuple):
    """seconds_s alone on the machine; after: positions of earlier tasks of the schedule.

    memory_share: of its seconds, what it reads or writes memory in, where others that run may disturb it.
    payload: what is to be done, a record that its executor knows; None where the name says it all.
    """

    name: str
    resource: Resource
    seconds_s: float
    after: tuple[int, ...] = ()
    payload: object = None
    memory_share: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """Tasks in issue order. Errors: ValueError for negative seconds or a task that waits for a later one."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        for i, task in enumerate(self.tasks):
            if not 0 <= task.seconds_s < float("inf"):
                raise ValueError(
                    f"Schedule: task {i}, {task.name}: expected seconds >= 0, got {task.seconds_s}"
                )
            if any(not 0 <= before < i for before in task.after):
                raise ValueError(
                    f"Schedule: task {i}, {task.name}: may only come after earlier tasks, got {task.after}"
                )

    @property
    def critical_path_s(self) -> float:
        """The longest chain of tasks that wait for each other, were every task to have its own resource."""
        end_s: list[float] = []
        for task in self.tasks:
            end_s.append(task.seconds_s + max((end_s[before] for before in task.after), default=0.0))
        return max(end_s, default=0.0)

    @property
    def busy_s(self) -> dict[Resource, float]:
        """Seconds of work by resource, each alone."""
        busy: dict[Resource, float] = {}
        for task in self.tasks:
            busy[task.resource] = busy.get(task.resource, 0.0) + task.seconds_s
        return busy


@dataclass
class ScheduleBuilder:
    """Collects tasks; `add` returns the position to wait for."""

    tasks: list[Task] = field(default_factory=list)

    def add(
        self,
        name: str,
        resource: Resource,
        seconds_s: float,
        after: Sequence[int] = (),
        payload: object = None,
        memory_share: float = 1.0,
    ) -> int:
        self.tasks.append(Task(name, resource, seconds_s, tuple(after), payload, memory_share))
        return len(self.tasks) - 1

    def build(self) -> Schedule:
        return Schedule(tuple(self.tasks))
