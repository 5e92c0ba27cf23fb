"""Threads for backends without native ones: a crew that runs one function together, and a submit queue."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

Work = tuple[Callable[[Any], None], Any]


class Crew:
    """`num_threads - 1` helpers beside the calling thread, started at first use and again after a fork.

    `function(job)` must share its work out by itself and be harmless when it finds none left, as
    numba_kernels.run_tasks does: `run` returns when the caller's own call does and waits for no helper.
    Any number of threads may call at once.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._lock = threading.Lock()
        self._pid = -1

    def run(self, function: Callable[[Any], None], job: Any, num_threads: int) -> None:
        """Call function(job) here and on up to num_threads - 1 helpers."""
        self._start_in_this_process()
        for _ in range(num_threads - 1):
            self._queue.put((function, job))
        function(job)

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Run `function` on a thread of its own, in the order of submission."""
        self._start_in_this_process()
        return self._submitted.submit(function)

    def _start_in_this_process(self) -> None:
        if self._pid == os.getpid():
            return
        with self._lock:
            if self._pid == os.getpid():
                return
            # A fork takes no threads along: the child gets new ones, and new queues that no lost thread has
            # locked.
            self._queue: queue.SimpleQueue[Work] = queue.SimpleQueue()
            self._submitted = ThreadPoolExecutor(1, thread_name_prefix="hostcompute-submit")
            for idx in range(self.num_threads - 1):
                threading.Thread(
                    target=_help, args=(self._queue,), name=f"hostcompute-{idx}", daemon=True
                ).start()
            self._pid = os.getpid()


def _help(work: queue.SimpleQueue[Work]) -> None:
    while True:
        function, job = work.get()
        function(job)
        del job  # the arrays of the last forward must not live until the next


_crews: dict[int, Crew] = {}
_crews_lock = threading.Lock()


def shared_crew(num_threads: int) -> Crew:
    """One crew per thread count for the whole process, so that many banks do not mean many threads."""
    with _crews_lock:
        return _crews.setdefault(num_threads, Crew(num_threads))


def _forget_locks() -> None:
    """In a forked child: locks may have been held by threads that no longer exist."""
    global _crews_lock
    _crews_lock = threading.Lock()
    for crew in _crews.values():
        crew._lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_locks)
