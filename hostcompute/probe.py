"""Ceilings of this machine, measured by the threads that do the work: what a benchmark figure is a share of."""

from __future__ import annotations

from typing import Any

from hostcompute.arrays import HostArray


def read_bandwidth(
    num_threads: int | None = None, num_bytes: int = 1 << 30, huge_pages: bool = True, repeats: int = 5
) -> float:
    """Bytes per second of reading `num_bytes` of fresh memory once with `num_threads` (default: all) pinned threads."""
    from hostcompute import _native

    return float(
        _native.read_bytes_per_s(
            _pool(num_threads), _native.available_isas()[0], num_bytes, huge_pages, repeats
        )
    )


def read_bandwidth_of(
    array: HostArray, num_bytes: int, num_threads: int | None = None, repeats: int = 5
) -> float:
    """The same over memory that is already there, a mapped checkpoint say."""
    from hostcompute import _native

    isa = _native.available_isas()[0]
    return float(_native.read_bytes_per_s_of(_pool(num_threads), isa, array.address, num_bytes, repeats))


def compute_peak(isa: str | None = None, num_threads: int | None = None) -> float:
    """Floating-point operations per second of an ISA's widest multiply-add, operands in registers or L1, all threads."""
    from hostcompute import _native
    from hostcompute.backends.native import choose_isa

    return float(_native.peak_flops_per_s(_pool(num_threads), choose_isa(isa)[0]))


def _pool(num_threads: int | None) -> Any:
    from hostcompute.pool import make_pool, shared_pool

    return shared_pool() if num_threads is None else make_pool(num_threads)
