"""The ranks that hold one model's experts together, and everything they say to each other.

Three process groups of the mesh's ranks: `control`, always Gloo, for sizes and agreements, so that no size ever waits
for a GPU; `inward` and `outward` for rows of activations, two, so that a chunk's results leave while the next arrives.
Every wait has one deadline, and what ends it is a RankError that says what to do. What a rank raises in a call of the
model, the others hear while they wait for it. W ranks, H words of a header.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hostcompute.topology import CoreShare
from monde.device.notices import Notice, Notices, break_off, one_line, wait_looking

T = TypeVar("T")

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class RankError(RuntimeError):
    """The ranks of a mesh cannot go on together; the message says why. Every rank gets one."""


class RankGroup:
    """This process among the ranks of a 1-D mesh. Making one, and every method but `check`, is for all of them.

    timeout_s: how long a rank waits for the others, anywhere. Ranks that have lost each other stay so.
    cores: this rank's share of the cores that it and others on the machine may use. machine_W: the first rank of each
    rank's machine.
    """

    def __init__(self, mesh: DeviceMesh, timeout_s: float) -> None:
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.device_type, self.timeout_s = mesh.device_type, timeout_s
        self._lost = ""
        self.num_calls, self._is_in_call = 0, False
        self._header_words = 0
        ranks = dist.get_process_group_ranks(mesh.get_group())

        def group(backend: str) -> dist.ProcessGroup:
            made = dist.new_group(
                ranks, timedelta(seconds=timeout_s), backend=backend, use_local_synchronization=True
            )
            assert isinstance(made, dist.ProcessGroup)
            return made

        def groups() -> tuple[dist.ProcessGroup, ...]:
            return tuple(map(group, ("gloo", BACKENDS[mesh.device_type], BACKENDS[mesh.device_type])))

        self._notices: Notices | None = None
        self.control, self.inward, self.outward = self.guarded(groups)
        self._notices = Notices(self.control, self.rank)
        here = (socket.gethostname(), _boot_id(), tuple(sorted(os.sched_getaffinity(0))))
        places_W = self.agree(here)
        machines_W = [there[:2] for there in places_W]
        self.machine_W = tuple(map(machines_W.index, machines_W))
        neighbours = [rank for rank, there in enumerate(places_W) if there == here]
        self.cores = CoreShare(neighbours.index(self.rank), len(neighbours))

    # ---- agreements, at loading ----
    def agree(self, value: Any = None) -> list[Any]:
        """Every rank's value, by rank. Errors: RankError on all where one came with `fail` instead."""
        return self._exchange_objects(None, value)

    def fail(self, error: BaseException) -> None:
        """Tell the others, who are or will be in `agree`, that this rank gives up. Telling once is enough."""
        if hasattr(error, "_told_ranks"):
            return
        error._told_ranks = True  # type: ignore[attr-defined]
        with contextlib.suppress(RankError):
            self._exchange_objects(" ".join(str(error).split()) or type(error).__name__, None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Whatever fails in here on one rank fails on all of them, at their next `agree`, or at the end."""
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            self.fail(error)
            raise
        self.agree()

    def _exchange_objects(self, error: str | None, value: Any) -> list[Any]:
        answers: list[Any] = [None] * self.size
        self.guarded(lambda: dist.all_gather_object(answers, (error, value), group=self.control))
        failed = [f"rank {rank}: {answer[0]}" for rank, answer in enumerate(answers) if answer[0] is not None]
        if failed:
            raise RankError("mesh: " + "; ".join(failed))
        return [answer[1] for answer in answers]

    def agree_same(self, settings: Mapping[str, Any]) -> None:
        """Errors: ValueError on all ranks where some have other settings, naming the first that differs."""
        by_rank = self.agree(dict(settings))
        for name in settings:
            values = [str(theirs.get(name)) for theirs in by_rank]
            if len(set(values)) > 1:
                told = ", ".join(f"rank {rank} {value}" for rank, value in enumerate(values))
                raise ValueError(f"mesh: ranks differ in {name}: {told}; give all of them the same")

    def reserve_header(self, num_words: int) -> None:
        """From here on nothing shorter is exchanged: Gloo ends a process that receives more than it waits for, so ranks
        that are in different calls must not differ in the lengths of what they send.
        """
        self._header_words = max(self._header_words, num_words)

    # ---- at every call of the model ----
    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """What is raised in here on one rank ends the others' waits in the same call at once.

        Where all raise, as for an input that none of them takes, nobody waits, and the next call works. Calls within
        a call are part of it.
        """
        if self._is_in_call:
            yield
            return
        self.num_calls, self._is_in_call = self.num_calls + 1, True
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            assert self._notices is not None
            self._notices.post(Notice(self.num_calls, self.rank, one_line(error)))
            raise
        finally:
            self._is_in_call = False

    # ---- at every layer ----
    def exchange(self, header_H: Tensor) -> Tensor:
        """header_WH: everybody's words, int32 on the CPU, of one length everywhere."""
        num_words = len(header_H)
        if num_words < self._header_words:
            header_H = torch.nn.functional.pad(header_H, (0, self._header_words - num_words))
        header_WH = torch.empty((self.size, len(header_H)), dtype=header_H.dtype, device="cpu")
        self.finish(
            self.guarded(
                lambda: dist.all_gather(list(header_WH), header_H, group=self.control, async_op=True)
            )
        )
        return header_WH[:, :num_words]

    def finish(self, work: Any) -> None:
        """Wait for a collective on Gloo. Errors: RankError."""
        self.guarded(lambda: wait_looking(work, self.look))

    def check(self) -> None:
        """Errors: RankError if the ranks have lost each other before."""
        if self._lost:
            raise RankError(self._lost)

    def guarded(self, action: Callable[[], T]) -> T:
        """The result of a collective. Errors: RankError, where torch has as many kinds as backends."""
        self.check()
        try:
            return action()
        except (RuntimeError, ValueError) as error:
            if isinstance(error, RankError):
                raise
            self.look()  # a rank that failed may have ended since
            raise self._gives_up(str(error).strip().partition("\n")[0]) from error

    def look(self) -> None:
        """Errors: RankError where another rank has failed in this call or takes part in nothing any more."""
        notices = [] if self._notices is None else self._notices.of_others(self.size)
        for notice in sorted(notices, key=lambda notice: notice.failed_rank is None):
            if notice.call is None or notice.call >= self.num_calls:  # it has left this call
                raise self._gives_up(notice.text, notice.failed_rank)

    def _gives_up(self, why: str, failed_rank: int | None = None) -> RankError:
        """For good: connections are broken off, so that nobody waits for this rank either."""
        self._lost = (
            f"mesh: rank {self.rank} lost the others ({why}); one died, was over {self.timeout_s:g} s late "
            "or called the model less often: restart all ranks, or give more time with mesh_timeout_s"
            if failed_rank is None
            else f"mesh: rank {failed_rank} failed: {why}; mend that and restart all ranks"
        )
        if self._notices is not None:
            self._notices.post(Notice(None, failed_rank, why))
            for group in (self.control, self.inward, self.outward):
                break_off(group)
        return RankError(self._lost)


_made: dict[tuple[object, ...], tuple[Any, RankGroup]] = {}


def ranks_of_mesh(mesh: DeviceMesh, timeout_s: float) -> RankGroup:
    """The one group of these ranks with this timeout, made at the first call, as long as torch's process groups live.

    Not one a model: torch names a group after its ranks, and a name used again finds the addresses of the group before.
    Errors: RankError.
    """
    world = dist.group.WORLD
    key = (tuple(dist.get_process_group_ranks(mesh.get_group())), mesh.device_type, timeout_s)
    if key not in _made or _made[key][0] is not world:
        _made[key] = (world, RankGroup(mesh, timeout_s))
    return _made[key][1]


def _boot_id() -> str:
    """Tells machines of one name apart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
