"""The streams of a long prompt: the caller's own computes, two more carry what must not hold it up.

weights   experts to the device; overlaps with products on the device and on the host
back      activations and counts to the host; overlaps with both, in the bus's other direction

`CudaLanes` works on a GPU; `InOrderLanes` is its twin where everything is done when it returns.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor


class Mark(Protocol):
    """A point in the current stream."""

    def wait(self) -> None:
        """Block the CPU until the device gets there."""
        ...

    def order(self) -> None:
        """What is launched on the current stream from now on comes after it."""
        ...

    def done(self) -> bool:
        """Whether the device got there. Waits for nothing."""
        ...

    def since_s(self, earlier: Mark) -> float | None:
        """Seconds on the device from a timed mark to this one; None while either lies ahead. Waits for nothing."""
        ...


class Lanes(Protocol):
    device: torch.device

    def on_weights(self) -> AbstractContextManager[Any]:
        """Launches inside go to the lane of weights."""
        ...

    def on_back(self) -> AbstractContextManager[Any]: ...

    def mark(self, timed: bool = False) -> Mark: ...

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """A small array on the device, copied through pinned memory on the current stream."""
        ...

    def copy_rows(self, target_NB: Tensor, source_NB: Tensor) -> None:
        """uint8 rows from the host, any stride between them; pinned memory only. On the current stream."""
        ...

    def close(self) -> None:
        """Wait for both lanes."""
        ...


class CudaLanes:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._weights, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def on_weights(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._weights)

    def on_back(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._back)

    def mark(self, timed: bool = False) -> Mark:
        event = torch.cuda.Event(enable_timing=timed)
        event.record(torch.cuda.current_stream(self.device))
        return _CudaMark(self.device, event)

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        # torch's pinned pool keeps the block until the copy is done.
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def copy_rows(self, target_NB: Tensor, source_NB: Tensor) -> None:
        import cupy  # pinned memory of somebody else is there only with CuPy (monde.device.pinned)

        num_rows, num_bytes = target_NB.shape
        cupy.cuda.runtime.memcpy2DAsync(
            target_NB.data_ptr(),
            target_NB.stride(0),
            source_NB.data_ptr(),
            source_NB.stride(0),
            num_bytes,
            num_rows,
            cupy.cuda.runtime.memcpyHostToDevice,
            torch.cuda.current_stream(self.device).cuda_stream,
        )

    def close(self) -> None:
        self._weights.synchronize()
        self._back.synchronize()


class _CudaMark:
    def __init__(self, device: torch.device, event: torch.cuda.Event) -> None:
        self._device, self._event = device, event

    def wait(self) -> None:
        self._event.synchronize()

    def order(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def done(self) -> bool:
        return bool(self._event.query())

    def since_s(self, earlier: Mark) -> float | None:
        assert isinstance(earlier, _CudaMark)
        if not self.done():
            return None
        return float(earlier._event.elapsed_time(self._event)) * 1e-3


class InOrderLanes:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def on_weights(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def on_back(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def mark(self, timed: bool = False) -> Mark:
        return _Passed()

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array)

    def copy_rows(self, target_NB: Tensor, source_NB: Tensor) -> None:
        target_NB.copy_(source_NB)

    def close(self) -> None: ...


class _Passed:
    def wait(self) -> None: ...

    def order(self) -> None: ...

    def done(self) -> bool:
        return True

    def since_s(self, earlier: Mark) -> float | None:
        return None  # nothing overlapped, so there is nothing to learn


def lanes_of(device: torch.device) -> Lanes:
    return CudaLanes(device) if device.type == "cuda" else InOrderLanes(device)
