"""The whole measurement: every probe twice, fits, one HardwareProfile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from hostcompute import ExpertSpec, make_pool
from hostcompute.probe import uncached_bytes
from hostcompute.topology import default_cores, machine_memory_bytes
from monde.calibration.dense import DenseProbes
from monde.calibration.gpu import GpuProbes
from monde.calibration.host import FORMATS, HostProbes, format_spec
from monde.calibration.samples import Progress, noise_of, poor_fits, take
from monde.executors.host import host_threads
from monde.planning.profile import HardwareProfile, MachineIdentity
from monde.sizes import format_bytes


@dataclass(frozen=True)
class Effort:
    """How much to measure. spec: the experts timed; all of them must not fit the caches.

    sample_s: the time of a half of the samples of a host probe. read_bytes: of the plain read test.
    copied_bytes: pinned memory that copies and zero-copy reads go through. retry_until_s: of the measurement, for probes
    whose halves disagree.
    """

    spec: ExpertSpec
    sample_s: float
    read_bytes: int
    copied_bytes: int
    retry_until_s: float = 0.0


# The experts of Qwen3-30B-A3B: 9.4 MB each, 1.2 GB a layer. Less than a minute with what goes before, most of it
# reading by threads.
FULL = Effort(
    ExpertSpec(128, 2048, 768),
    sample_s=0.2,
    read_bytes=uncached_bytes(),
    copied_bytes=1 << 29,
    retry_until_s=45.0,
)


def calibrate(
    machine: MachineIdentity, effort: Effort = FULL, start: Callable[[int], Progress] | None = None
) -> HardwareProfile:
    """Measure this machine. `start` is told how many probes will run and gives back who hears of each.

    A profile with `noisy` entries is returned like any other: trusting it is the caller's choice.
    Errors: ImportError without the native kernels, ValueError when memory is short or the GPU cannot decode.
    """
    on_gpu = machine.gpu is not None
    _check_memory(effort, on_gpu)
    pool = make_pool(host_threads() if on_gpu else len(default_cores()))
    host = HostProbes(effort.spec, pool, effort.sample_s, effort.read_bytes)
    device = torch.device("cuda:0" if on_gpu else "cpu")
    gpu = GpuProbes(host, pool, device, effort.copied_bytes) if on_gpu else None
    dense = DenseProbes(device)
    try:
        probes = [*dense.probes(), *host.probes(), *(gpu.probes() if gpu is not None else [])]
        progress = start(2 * len(probes)) if start is not None else lambda what: None
        samples = take(probes, progress, effort.retry_until_s)
        fits = None if gpu is None else gpu.fits(samples)
        return HardwareProfile(
            machine=machine,
            source=_source(effort, host.num_threads),
            memory_bytes=machine_memory_bytes(),
            host_read=host.read_curve(samples),
            host_expert=host.expert_rate(samples),
            gpu=None
            if gpu is None or fits is None
            else gpu.profile(fits, samples, partial(dense.captured_block_s, samples)),
            host_call_s=host.call_s(samples),
            eager_block_s=dense.eager_block_s(samples),
            step_s=dense.step_s(samples),
            noisy=noise_of(samples) + (() if fits is None else poor_fits(fits.named())),
            host_formats=host.format_rates(samples),
        )
    finally:
        if gpu is not None:
            gpu.close()
        host.close()


def _check_memory(effort: Effort, on_gpu: bool) -> None:
    specs = [effort.spec, *(format_spec(effort.spec, dtype) for dtype in FORMATS.values())]
    experts_bytes = sum(spec.num_experts * spec.expert_bytes for spec in specs)
    need_bytes = experts_bytes + effort.read_bytes + (effort.copied_bytes if on_gpu else 0)
    free_bytes = psutil.virtual_memory().available
    if need_bytes > free_bytes:
        raise ValueError(
            f"calibrate: needs {format_bytes(need_bytes)} of host memory, {format_bytes(free_bytes)} are free; "
            "end other programs and try again"
        )


def _source(effort: Effort, num_threads: int) -> str:
    spec = effort.spec
    return (
        f"measured: experts of {spec.d_model}x{spec.d_ffn} in {spec.dtype.value}, {num_threads} host threads"
    )
