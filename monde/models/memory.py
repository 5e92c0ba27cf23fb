"""How much host memory a piece of work took at its worst."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

_INTERVAL_S = 0.005


class PeakMemory:
    """Samples this process's resident memory in a thread until `stop`. Growth counts from the start."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start_bytes = self._peak_bytes = int(self._process.memory_info().rss)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="monde-peak-memory", daemon=True)
        self._thread.start()

    def __enter__(self) -> PeakMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """Peak growth in bytes, what is held now included. May be called again."""
        self._done.set()
        self._thread.join()
        self._look()  # what is held now counts, whenever the thread looked last
        return self._peak_bytes - self._start_bytes

    def _look(self) -> None:
        self._peak_bytes = max(self._peak_bytes, int(self._process.memory_info().rss))

    def _sample(self) -> None:
        while True:
            self._look()
            if self._done.wait(_INTERVAL_S):
                return
