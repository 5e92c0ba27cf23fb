"""Why a rank fails, told to the others outside of the collectives in which they wait for it.

Notices lie in the store through which the process group was made. Who waits looks for them now and then; who gives up
breaks its connections off, so that nobody waits for it until a timeout, in whatever thread.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Looked for after that long and as often: longer than steps wait for each other, and no load for the store.
LOOK_S = 0.1
# How long the store may take to answer: it may lie beyond the very link that is jammed or dead, and has no limit itself.
ANSWER_S = 1.0
_BREAK_TAG = 2**20 + 1  # of a message that nobody sends
T = TypeVar("T")


@dataclass(frozen=True)
class Notice:
    """Of a rank that failed in its call of that number, or, call None, takes part in nothing any more.

    failed_rank: whose error `text` (one line) is; None where ranks have lost each other.
    """

    call: int | None
    failed_rank: int | None
    text: str


class Notices:
    """Those of the ranks of one group, of which all have one. Nothing here waits for another rank, and for the store no
    longer than ANSWER_S.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self.rank = rank
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.distributed_c10d.PrefixStore(f"monde notices of {group.group_name}", store)
        self._asking: threading.Thread | None = None

    def post(self, notice: Notice) -> None:
        """In place of what this rank posted before."""

        def tell() -> None:
            self._store.set(str(self.rank), json.dumps(asdict(notice)))
            self._store.add("count", 1)

        self._ask(tell, None)

    def of_others(self, num_ranks: int) -> list[Notice]:
        """The latest of every other rank that has posted one; none where the store does not say."""

        def read() -> list[str]:
            if self._store.add("count", 0) == 0:
                return []
            keys = [str(rank) for rank in range(num_ranks) if rank != self.rank]
            return [self._store.get(key).decode() for key in keys if self._store.check([key])]

        if self._asking is not None and self._asking.is_alive():
            return []
        texts: list[str] = self._ask(read, [])
        return [Notice(**json.loads(text)) for text in texts]

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        answers: list[T] = []

        def ask() -> None:
            # The store ends with the process that holds it: then there is nobody to tell.
            with contextlib.suppress(RuntimeError):
                answers.append(question())

        self._asking = threading.Thread(target=ask, daemon=True)
        self._asking.start()
        self._asking.join(ANSWER_S)
        return answers[0] if answers else otherwise


def wait_looking(work: Any, look: Callable[[], None]) -> None:
    """Wait for a collective on Gloo, and call `look` every LOOK_S meanwhile, which may raise.

    Not for messages to one rank: a wait for those that is too short breaks the connection.
    """
    while True:
        try:
            work.wait(timedelta(seconds=LOOK_S))
            return
        except RuntimeError:
            if work.is_completed():  # by now, or with the error of the collective itself
                work.wait()
                return
        look()


def break_off(group: dist.ProcessGroup | None) -> None:
    """Close this rank's connections of a Gloo group: all that wait on them, here and there, get an error at once.

    Gloo has no call for it, but closes them all where a wait for a message takes too long; a wait on a connection that
    another rank has closed ends at once and closes no other one, so every rank is waited for.
    """
    if group is None or dist.get_backend(group) != dist.Backend.GLOO or dist.get_world_size(group) == 1:
        return
    mine, size = dist.get_rank(group), dist.get_world_size(group)
    for other in (*range(mine + 1, size), *range(mine)):
        with contextlib.suppress(RuntimeError):
            message = dist.irecv(torch.empty(1), group=group, group_src=other, tag=_BREAK_TAG)
            assert message is not None, "this rank is no member of the group"
            message.wait(timedelta(milliseconds=1))


def one_line(error: BaseException) -> str:
    """Kind and text of an error."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_of_a_backend(error: BaseException) -> bool:
    """Whether a collective did not end, where torch has as many kinds of error as backends."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("/gloo/" in text or "timed out" in text.lower())
