"""The thread pool that banks share."""

from __future__ import annotations

import threading
from typing import Any

from hostcompute.topology import ALL_CORES, CoreShare, choose_cores, default_cores

# How long threads look for the next layer's work, yielding their core, before they sleep. Waking a sleeping thread
# cost 50 to 300 us on virtual machines; a decode step comes back per layer within a millisecond or two.
SPIN_S = 2e-3

_shared: Any = None
_guard = threading.Lock()


def make_pool(num_threads: int | None = None, share: CoreShare = ALL_CORES) -> Any:
    """A native pool of pinned threads (default: MONDE_NUM_THREADS, or one for every core of this process's share).

    Errors: ValueError for an impossible number of threads, ImportError without the native module.
    """
    from hostcompute import _native

    cores = default_cores(share) if num_threads is None else choose_cores(num_threads, share)
    return _native.Pool([core.cpu_id for core in cores], [core.node_id for core in cores], SPIN_S)


def shared_pool() -> Any:
    """The process's pool, made at first use with MONDE_NUM_THREADS threads or one for every core."""
    global _shared
    with _guard:
        if _shared is None:
            _shared = make_pool()
        return _shared
