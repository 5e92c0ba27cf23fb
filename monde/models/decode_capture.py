"""Recording one step and running it again: the interface, and its CUDA graph.

Everything else about decode graphs runs on any device; only `CudaCapture` needs a GPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Step = Callable[[], Any]


class Graph(Protocol):
    """A recorded step. `outputs` is a tree whose tensors every replay overwrites."""

    outputs: Any

    def replay(self) -> None: ...


class Capture(Protocol):
    """Records steps. Work launched between `enter` and `leave` comes after that of the pair before."""

    device_type: str

    def warm_up(self, step: Step) -> None:
        """Run the step once as it will be captured."""

    def capture(self, step: Step) -> Graph:
        """Errors: CaptureError when the step cannot be recorded; streams and allocator are usable then."""

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class CaptureError(RuntimeError):
    """The step cannot be recorded; the message says why."""


@dataclass(eq=False)
class CudaGraph:
    graph: torch.cuda.CUDAGraph
    outputs: Any

    def replay(self) -> None:
        self.graph.replay()


class CudaCapture:
    """CUDA graphs of one model. They share one memory pool, so no two may run at once: see `enter`."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # warm-up and capture: the default stream cannot be captured
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[CudaGraph] = weakref.WeakSet()
        self._done = torch.cuda.Event()

    def warm_up(self, step: Step) -> None:
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            step()
        caller.wait_stream(self.stream)

    def capture(self, step: Step) -> CudaGraph:
        # Not torch.cuda.graph: after a failed capture it leaves its stream current.
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        keep_pool = list(self._graphs)
        if not keep_pool:  # torch gives a pool up with its last graph, and refuses to record into it again
            self._pool = torch.cuda.graph_pool_handle()
        graph, outputs, failure = torch.cuda.CUDAGraph(), None, None
        with torch.cuda.stream(self.stream):
            # thread_local: other threads may allocate and copy meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = step()
            except Exception as error:
                failure = error
            try:
                graph.capture_end()
            except RuntimeError as error:
                failure = failure or error
        if failure is not None:
            self._recover()
            raise CaptureError(_first_line(failure)) from failure
        recorded = CudaGraph(graph, outputs)
        self._graphs.add(recorded)
        return recorded

    def _recover(self) -> None:
        """End what an invalidated capture left open: the allocator's pool and the generator's capture mode.

        torch closes both at the end of a sound capture only; without it sampling fails afterwards with
        "Offset increment outside graph capture".
        """
        torch.cuda.synchronize(self.device)
        with contextlib.suppress(RuntimeError):  # closed already where the capture itself was sound
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        sound, one = torch.cuda.CUDAGraph(), torch.zeros(1, device=self.device)
        with torch.cuda.stream(self.stream):
            sound.capture_begin(capture_error_mode="thread_local")
            one.add_(1)
            sound.capture_end()
        torch.cuda.synchronize(self.device)

    def enter(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._done)

    def leave(self) -> None:
        self._done.record(torch.cuda.current_stream(self.device))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
