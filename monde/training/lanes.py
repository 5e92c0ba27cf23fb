"""Lanes: what runs beside the compute stream, in order of submission, one lane for each kind of link.

On CPUs a lane is a thread, on CUDA a stream; both make the process group's calls of their own link and no other, so
that every rank issues a link's collectives in the same order. A lane that failed fails at once from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from monde.planning.schedule import Resource

Action = Callable[[], None]


class Ticket(Protocol):
    """Something submitted to a lane."""

    def wait(self) -> None:
        """The compute stream goes on after it. Raises what the action raised."""
        ...


@dataclass(frozen=True)
class Stamp:
    """When one action ran, in seconds of time.perf_counter. On CUDA actions are not stamped."""

    name: str
    resource: Resource
    start_s: float
    end_s: float


class Done:
    """The ticket of what the compute stream itself did."""

    def wait(self) -> None:
        pass


@dataclass(frozen=True)
class _ThreadTicket:
    future: Future[None]

    def wait(self) -> None:
        self.future.result()


@dataclass(frozen=True)
class _StreamTicket:
    event: torch.cuda.Event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)


class ThreadLane:
    """stamps: where to note when actions ran; None notes nothing."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.stamps: list[Stamp] | None = None
        self._thread = ThreadPoolExecutor(1, f"monde {resource.value}")
        self._failure: BaseException | None = None

    def submit(self, name: str, action: Action, after: Sequence[Ticket] = ()) -> Ticket:
        return _ThreadTicket(self._thread.submit(self._run, name, action, after))

    def _run(self, name: str, action: Action, after: Sequence[Ticket]) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            for ticket in after:
                ticket.wait()
            start_s = time.perf_counter()
            with torch.no_grad():  # the mode belongs to a thread, and a new thread's is on
                action()
        except BaseException as error:
            self._failure = error
            raise
        if self.stamps is not None:
            self.stamps.append(Stamp(name, self.resource, start_s, time.perf_counter()))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class StreamLane:
    """An action starts after what the compute stream was given before it was submitted.

    That also makes memory safe without record_stream: whatever an action allocates has been let go in Python only
    after its readers were launched, and the lane waits for those before its next action.
    """

    def __init__(self, resource: Resource, device: torch.device) -> None:
        self.resource = resource
        self.stamps: list[Stamp] | None = None
        self._stream = torch.cuda.Stream(device)

    def submit(self, name: str, action: Action, after: Sequence[Ticket] = ()) -> Ticket:
        launched = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(self._stream), torch.no_grad():
            self._stream.wait_event(launched)
            for ticket in after:
                ticket.wait()
            action()
            return _StreamTicket(self._stream.record_event())

    def close(self) -> None:
        pass


Lane = ThreadLane | StreamLane


def make_lane(resource: Resource, device: torch.device) -> Lane:
    return StreamLane(resource, device) if device.type == "cuda" else ThreadLane(resource)
