"""Copies between pinned host memory and the GPU, by size, and kernels that read pinned memory themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from monde.calibration.overlap import beside_names
from monde.calibration.samples import Probe, Samples, Timings, repeated, seconds_of
from monde.device.streams import current_stream
from monde.planning.fit import AlphaBeta, fit_alpha_beta

_SIZES_BYTES = tuple(1 << i for i in range(16, 27, 2))  # 64 KiB to 64 MiB
_NUM_SAMPLES = 12
_NUM_QUEUED = 8  # copies behind one another, as the runtime issues them: alpha holds no waiting for the host
_NUM_BESIDE = 48  # copies of the largest size that run beside something else
_ALONE_S = 0.05
_ZERO_COPY = "zero-copy read, per byte"


class Copies:
    """`num_bytes` of pinned memory, gone through piece by piece so that no cache holds it, and one copy stream."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        assert num_bytes >= _SIZES_BYTES[-1], num_bytes
        self.device = device
        self.pinned_B = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.on_gpu_B = torch.zeros(_SIZES_BYTES[-1], dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)
        self._turn = count()

    def probes(self) -> list[Probe]:
        ways = [(way, size) for way in ("h2d", "d2h") for size in _SIZES_BYTES]
        copies = [Probe(_copy_name(way, size), partial(self._copies, way, size)) for way, size in ways]
        return [*copies, Probe(_ZERO_COPY, self._zero_copy)]

    def zero_copy_bytes_per_s(self, samples: dict[str, Samples]) -> float:
        return 1 / samples[_ZERO_COPY].median_s

    def beside(self, activity: str, step: Callable[[], None]) -> Timings:
        """Seconds of steps and of large copies to the GPU, alone and while the other runs all the time.

        `step` must wait for its own end, and not for the copy stream.
        """
        alone_s = repeated(step, _ALONE_S)
        start, end = self._queue("h2d", _SIZES_BYTES[-1], _NUM_BESIDE)
        end.synchronize()
        copy_alone_s = start.elapsed_time(end) * 1e-3 / _NUM_BESIDE
        steps_s: list[float] = []
        start, end = self._queue("h2d", _SIZES_BYTES[-1], _NUM_BESIDE)
        while not end.query():
            steps_s.append(seconds_of(step))
        copy_s = start.elapsed_time(end) * 1e-3 / _NUM_BESIDE
        # The last step may have outlived the copies; where it is the only one it is all there is.
        return dict(
            zip(
                beside_names(activity),
                (alone_s, [copy_alone_s], steps_s[:-1] or steps_s, [copy_s]),
                strict=True,
            )
        )

    def _copies(self, way: str, size: int) -> Timings:
        samples = []
        for _ in range(_NUM_SAMPLES + 1):
            start, end = self._queue(way, size, _NUM_QUEUED)
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e-3 / _NUM_QUEUED)
        return {_copy_name(way, size): samples[1:]}  # the first one warms up

    def _queue(self, way: str, size: int, num_copies: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Copies on the copy stream between two events that take the time."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            start.record()
            for _ in range(num_copies):
                host_B, gpu_B = self._piece(size), self.on_gpu_B[:size]
                target_B, source_B = (gpu_B, host_B) if way == "h2d" else (host_B, gpu_B)
                target_B.copy_(source_B, non_blocking=True)
            end.record()
        return start, end

    def _piece(self, size: int) -> Tensor:
        num_pieces = len(self.pinned_B) // size
        start = next(self._turn) % num_pieces * size
        return self.pinned_B[start : start + size]

    def _zero_copy(self) -> Timings:
        import cupy

        num_bytes = len(self.pinned_B) // 4 * 4
        # Pinned memory has one address for both sides.
        memory = cupy.cuda.UnownedMemory(
            self.pinned_B.data_ptr(), num_bytes, self.pinned_B, self.device.index or 0
        )
        numbers: Any = cupy.ndarray(
            num_bytes // 4, dtype=cupy.float32, memptr=cupy.cuda.MemoryPointer(memory, 0)
        )

        def read() -> None:
            with current_stream(self.device):
                numbers.sum()
            torch.cuda.synchronize(self.device)

        return {_ZERO_COPY: [s / num_bytes for s in repeated(read, _ALONE_S)]}


def fit_copies(way: str, samples: dict[str, Samples]) -> AlphaBeta:
    """Of "h2d" or "d2h", over bytes."""
    timed = [(size, s) for size in _SIZES_BYTES for s in samples[_copy_name(way, size)].all_s]
    return fit_alpha_beta([size for size, _ in timed], [s for _, s in timed])


def _copy_name(way: str, size: int) -> str:
    return f"{way} of {size} bytes"
