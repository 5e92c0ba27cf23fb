"""The streams of a long prompt: the caller's own computes, two more carry what must not hold it up.

main      the caller's current stream when a batch begins
weights   experts to the device; overlaps with products on the device and on the host
back      activations and counts to the host; overlaps with both, in the bus's other direction

`CudaLanes` works on a GPU; `InOrderLanes` is its twin where everything is done when it returns. Python launches a layer
while the host's threads have most of the machine, so nothing here asks torch which stream is the current one.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from monde.device.streams import current_address

_UPLOAD_BYTES = 1 << 20  # a layer of 512 experts and 32768 pairs is told about in 50 KiB
_ALIGN_BYTES = 64
_TORCH_OF = {"<i8": torch.int64, "<f4": torch.float32}


class Mark(Protocol):
    """A point in a lane."""

    def wait(self) -> None:
        """Block the CPU until the device gets there."""
        ...

    def done(self) -> bool:
        """Whether the device got there. Waits for nothing."""
        ...

    def since_s(self, earlier: Mark) -> float | None:
        """Seconds on the device from a timed mark to this one; None while either lies ahead. Waits for nothing."""
        ...


class Lane(Protocol):
    """What is launched on it runs in order."""

    def mark(self, timed: bool = False) -> Mark: ...

    def after(self, mark: Mark) -> None:
        """What is launched from now on comes after the mark."""
        ...

    def as_current(self) -> AbstractContextManager[Any]:
        """torch's launches inside go to this lane."""
        ...

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Between addresses; of host memory pinned only."""
        ...

    def copy_rows(
        self, target: tuple[int, int], source: tuple[int, int], num_bytes: int, num_rows: int
    ) -> None:
        """Rows of num_bytes; each side's address and bytes from row to row. As copy."""
        ...


class Lanes(Protocol):
    device: torch.device
    main: Lane
    weights: Lane
    back: Lane

    def begin(self) -> None:
        """A batch begins: the caller's current stream is main."""
        ...

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """A small array on the device, copied through pinned memory on the current stream."""
        ...

    def uploaded(self) -> None:
        """All that was uploaded so far has arrived: its pinned memory is free."""
        ...

    def close(self) -> None:
        """Wait for both side lanes."""
        ...


class CudaLanes:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]
        self.weights, self.back = map(_cuda_lane, self._streams)
        self.main, self._main_address = _cuda_lane(torch.cuda.current_stream(device)), current_address(device)
        with torch.inference_mode(False):  # steps in any mode write to it
            self._upload_B = torch.empty(_UPLOAD_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._upload_np_B, self._num_uploaded = self._upload_B.numpy(), 0

    def begin(self) -> None:
        address = current_address(self.device)
        if address != self._main_address:
            self.main, self._main_address = _cuda_lane(torch.cuda.current_stream(self.device)), address

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        begin, end = self._num_uploaded, self._num_uploaded + array.nbytes
        if end > _UPLOAD_BYTES:  # then torch's pinned pool keeps a block until the copy is done
            return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)
        self._upload_np_B[begin:end].view(array.dtype)[...] = array.reshape(-1)
        self._num_uploaded = -(-end // _ALIGN_BYTES) * _ALIGN_BYTES
        dtype = _TORCH_OF[array.dtype.str]
        here = self._upload_B[begin:end].view(dtype).view(array.shape)
        return here.to(self.device, non_blocking=True)

    def uploaded(self) -> None:
        self._num_uploaded = 0

    def close(self) -> None:
        for stream in self._streams:
            stream.synchronize()


class _CudaLane:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream, self.address = stream, int(stream.cuda_stream)

    def mark(self, timed: bool = False) -> Mark:
        event = torch.cuda.Event(enable_timing=timed)
        event.record(self.stream)
        return _CudaMark(event)

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        mark.event.wait(self.stream)

    def as_current(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        runtime = _runtime()
        runtime.memcpyAsync(target, source, num_bytes, runtime.memcpyDefault, self.address)

    def copy_rows(
        self, target: tuple[int, int], source: tuple[int, int], num_bytes: int, num_rows: int
    ) -> None:
        runtime = _runtime()
        runtime.memcpy2DAsync(*target, *source, num_bytes, num_rows, runtime.memcpyDefault, self.address)


def _cuda_lane(stream: torch.cuda.Stream) -> Lane:
    return _CudaLane(stream)


@cache
def _runtime() -> Any:
    """CuPy's: memory of somebody else is pinned only with CuPy (monde.device.pinned)."""
    from cupy.cuda import runtime

    return runtime


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()

    def done(self) -> bool:
        return bool(self.event.query())

    def since_s(self, earlier: Mark) -> float | None:
        assert isinstance(earlier, _CudaMark)
        if not self.done():
            return None
        return float(earlier.event.elapsed_time(self.event)) * 1e-3


class InOrderLanes:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        lane: Lane = _InOrderLane()
        self.main = self.weights = self.back = lane

    def begin(self) -> None: ...

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array)

    def uploaded(self) -> None: ...

    def close(self) -> None: ...


class _InOrderLane:
    def mark(self, timed: bool = False) -> Mark:
        return _Passed()

    def after(self, mark: Mark) -> None: ...

    def as_current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(target, source, num_bytes)

    def copy_rows(
        self, target: tuple[int, int], source: tuple[int, int], num_bytes: int, num_rows: int
    ) -> None:
        for row in range(num_rows):
            ctypes.memmove(target[0] + row * target[1], source[0] + row * source[1], num_bytes)


class _Passed:
    def wait(self) -> None: ...

    def done(self) -> bool:
        return True

    def since_s(self, earlier: Mark) -> float | None:
        return None  # nothing overlapped, so there is nothing to learn


def lanes_of(device: torch.device) -> Lanes:
    return CudaLanes(device) if device.type == "cuda" else InOrderLanes(device)
