"""Ceilings of this machine, measured by the threads that do the work: what a benchmark figure is a share of."""

from __future__ import annotations

from typing import Any

from hostcompute.topology import last_level_cache_bytes


def uncached_bytes() -> int:
    """Memory so large that reading it through again finds next to nothing of it in the caches.

    Servers have last-level caches of 300 MiB: half of a 512 MiB test came from there.
    """
    return max(1 << 30, 4 * last_level_cache_bytes())


def read_bandwidth(
    num_threads: int | None = None, num_bytes: int | None = None, huge_pages: bool = True, repeats: int = 5
) -> float:
    """Bytes per second of reading fresh memory through with `num_threads` (default: all) pinned threads.

    num_bytes: of memory, by default more than the caches hold; the fastest of `repeats` readings counts.
    """
    from hostcompute import _native

    return float(
        _native.read_bytes_per_s(
            _pool(num_threads),
            _native.available_isas()[0],
            uncached_bytes() if num_bytes is None else num_bytes,
            huge_pages,
            repeats,
        )
    )


def read_bandwidth_of(address: int, num_bytes: int, pool: Any, repeats: int = 5) -> float:
    """The same over memory that is already there, a mapped checkpoint say, by the threads of `pool`."""
    from hostcompute import _native

    isa = _native.available_isas()[0]
    return float(_native.read_bytes_per_s_of(pool, isa, address, num_bytes, repeats))


def compute_peak(isa: str | None = None, num_threads: int | None = None) -> float:
    """Floating-point operations per second of an ISA's widest multiply-add, operands in registers or L1, all threads."""
    from hostcompute import _native
    from hostcompute.backends.native import choose_isa

    return float(_native.peak_flops_per_s(_pool(num_threads), choose_isa(isa)[0]))


def _pool(num_threads: int | None) -> Any:
    from hostcompute.pool import make_pool, shared_pool

    return shared_pool() if num_threads is None else make_pool(num_threads)
