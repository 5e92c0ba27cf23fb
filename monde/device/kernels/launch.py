"""Kernels that may begin before what was launched in front of them has ended: programmatic dependent launch.

A decode step is a thousand kernels of a few microseconds in a row, and from the end of one to the first loads of the
next pass one or two. On Hopper and later GPUs a kernel can be launched early: its blocks take the room that is left,
load what nobody writes and wait in `await_earlier_launches` (overlap.cuh). CuPy has no such launch, so the driver is
called here, but only while a graph is captured: elsewhere Python's launching is what takes the time, and CuPy's is the
quicker call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

_EARLY_CAPABILITY = (9, 0)
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, with a value that is an int."""

    _fields_ = (("id", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int32 * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Kernel:
    """kernel(grid, block, arguments, shared_mem=0) on CuPy's current stream, torch's; its blocks wait as overlap.cuh says.

    function: CuPy's. arguments: addresses as int, NumPy scalars, and records as arrays [1].
    """

    function: Any

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[int | np.generic | np.ndarray[Any, Any]],
        shared_mem: int = 0,
    ) -> None:
        if (
            torch.cuda.is_current_stream_capturing()
            and torch.cuda.get_device_capability() >= _EARLY_CAPABILITY
        ):
            self._launch_early(grid, block, arguments, shared_mem)
        else:
            self.function(tuple(grid), tuple(block), tuple(arguments), shared_mem=shared_mem)

    def _launch_early(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], shared_bytes: int
    ) -> None:
        """Errors: RuntimeError with the driver's number."""
        import cupy

        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,))
        config = _Config(
            _three(grid),
            _three(block),
            shared_bytes,
            cupy.cuda.get_current_stream().ptr,
            ctypes.pointer(attribute),
            1,
        )
        values = [ctypes.create_string_buffer(bytes_of(one)) for one in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        handle = ctypes.c_void_p(self.function.kernel.ptr)
        if code := _driver().cuLaunchKernelEx(ctypes.byref(config), handle, addresses, None):
            raise RuntimeError(f"launching {self.function.name}: error {code} of the CUDA driver")


def bytes_of(argument: int | np.generic | np.ndarray[Any, Any]) -> bytes:
    """As the kernel gets it: an int is an address or another number of 64 bits."""
    return (np.int64(argument) if isinstance(argument, int) else argument).tobytes()


def _three(sizes: Sequence[int]) -> tuple[int, ...]:
    return (*sizes, 1, 1)[:3]


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
