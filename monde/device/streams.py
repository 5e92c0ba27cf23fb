"""torch's streams as CuPy sees them: kernels of both run in one order."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


class _Borrowed:
    """CUDA's stream protocol over an address: torch's default stream has one, too."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def current_address(device: torch.device) -> int:
    """Of torch's current stream of `device`. Compiled code of torch asks this way, too: its Stream takes ten times as long."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(torch._C._cuda_getCurrentRawStream(index))


def current_stream(device: torch.device) -> Any:
    """torch's current stream of `device` as a context manager of CuPy."""
    return _borrow(current_address(device))


@lru_cache(maxsize=64)
def _borrow(address: int) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_Borrowed(address))
