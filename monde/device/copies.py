"""Copies that nobody waits for: of experts into their slots on a stream of their own, of small things back.

`Copies` is the interface; `CudaCopies` works on a GPU, `InOrderCopies` is its twin where everything runs in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Arrival(Protocol):
    """Copies under way."""

    def done(self) -> bool:
        """Without waiting."""
        ...

    def order(self) -> None:
        """What is launched from now on comes after the copies."""
        ...


class Copies(Protocol):
    def to_device(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        """Copy host tensors, the second of each pair, once all that was launched so far is done."""
        ...

    def from_device(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        """Copy device tensors, the second of each pair, to pinned memory, once all that was launched so far is done."""
        ...

    def launched(self) -> Arrival:
        """All that was launched so far."""
        ...

    def to_host(self, target: Tensor, source: Tensor) -> Arrival:
        """Copy a device tensor as all that was launched so far leaves it; `target` is from `host_like`."""
        ...

    def host_like(self, tensor: Tensor) -> Tensor: ...

    def close(self) -> None:
        """Wait for all copies."""
        ...


class CudaCopies:
    """stream: copies of experts; it overlaps with the steps of the model on the streams of the callers."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def to_device(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        # Pageable memory would make the driver wait for the stream. pin_memory returns what is pinned already as
        # it is; anything else goes through torch's pinned pool, which keeps the buffer until the copy is done.
        pinned = [(target, source.pin_memory()) for target, source in pairs]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for target, source in pinned:
                target.copy_(source, non_blocking=True)
        return _CudaArrival(self.device, self.stream.record_event())

    def from_device(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return _CudaArrival(self.device, self.stream.record_event())

    def launched(self) -> Arrival:
        return _CudaArrival(self.device, torch.cuda.current_stream(self.device).record_event())

    def to_host(self, target: Tensor, source: Tensor) -> Arrival:
        target.copy_(source, non_blocking=True)
        return _CudaArrival(self.device, torch.cuda.current_stream(self.device).record_event())

    def host_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def close(self) -> None:
        self.stream.synchronize()


class _CudaArrival:
    def __init__(self, device: torch.device, event: torch.cuda.Event) -> None:
        self._device, self._event = device, event

    def done(self) -> bool:
        return bool(self._event.query())

    def order(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class InOrderCopies:
    """Every copy is done when it returns."""

    def to_device(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        for target, source in pairs:
            target.copy_(source)
        return _Arrived()

    def from_device(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        return self.to_device(pairs)

    def launched(self) -> Arrival:
        return _Arrived()

    def to_host(self, target: Tensor, source: Tensor) -> Arrival:
        target.copy_(source)
        return _Arrived()

    def host_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor)

    def close(self) -> None: ...


class _Arrived:
    def done(self) -> bool:
        return True

    def order(self) -> None: ...


def copies_of(device: torch.device) -> Copies:
    return CudaCopies(device) if device.type == "cuda" else InOrderCopies()
