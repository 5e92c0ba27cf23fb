"""Which cores this process may use, on which NUMA node each lies, and how much memory there is."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from hostcompute import env

_NODES = Path("/sys/devices/system/node")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_MEMORY = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Core:
    """A logical CPU and its NUMA node, both numbered as the pool counts them (nodes from 0, without gaps)."""

    cpu_id: int
    node_id: int


@dataclass(frozen=True)
class CoreShare:
    """One of num_processes that divide the cores they may all use, as ranks of one machine do."""

    process_idx: int
    num_processes: int


ALL_CORES = CoreShare(0, 1)


def parse_cpu_list(text: str) -> list[int]:
    """'0-3,8' -> [0, 1, 2, 3, 8], as the kernel writes CPU lists."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def allowed_cores() -> list[Core]:
    """The cores of this process's affinity mask, grouped by node."""
    allowed = sorted(os.sched_getaffinity(0))
    node_of: dict[int, int] = {}
    for path in sorted(_NODES.glob("node[0-9]*/cpulist")):
        node_of.update(dict.fromkeys(parse_cpu_list(path.read_text()), int(path.parent.name[4:])))
    used = sorted({node_of.get(cpu, 0) for cpu in allowed})
    return sorted(
        (Core(cpu, used.index(node_of.get(cpu, 0))) for cpu in allowed),
        key=lambda core: (core.node_id, core.cpu_id),
    )


def quota_cpus() -> float:
    """CPUs' worth of time that the container grants (cgroup v2), infinity without a limit.

    More threads than that are stopped in turn by the scheduler, which ruins every barrier.
    """
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return math.inf
    return math.inf if quota == "max" else int(quota) / int(period)


def default_cores(share: CoreShare = ALL_CORES) -> list[Core]:
    """One core a thread where nobody gives a number: MONDE_NUM_THREADS of them, else all.

    Errors: ValueError for a number that the variable cannot have here.
    """
    return choose_cores(env.num_threads(), share, "MONDE_NUM_THREADS")


def choose_cores(
    num_threads: int | None, share: CoreShare = ALL_CORES, asked_by: str = "num_threads"
) -> list[Core]:
    """One core a thread: all that are allowed and paid for, or `num_threads` spread evenly over the nodes.

    Of those cores a share is a run of neighbours; where there are fewer cores than processes, one core each, in turn.

    Errors: ValueError, naming asked_by, for fewer than one thread or more than there are cores.
    """
    cores = allowed_cores()
    i, n = share.process_idx, share.num_processes
    if n > len(cores):
        cores = [cores[i % len(cores)]]
    else:
        cores = cores[i * len(cores) // n : (i + 1) * len(cores) // n]
    if num_threads is None:
        quota = quota_cpus()
        num_threads = len(cores) if quota == math.inf else max(1, min(len(cores), math.ceil(quota) // n))
    if not 1 <= num_threads <= len(cores):
        raise ValueError(
            f"{asked_by}: expected 1..{len(cores)} (the cores this process may use), got {num_threads}; "
            f"leave {asked_by} out to use every core"
        )
    picked = [cores[i * len(cores) // num_threads] for i in range(num_threads)]
    used = sorted({core.node_id for core in picked})
    return [Core(core.cpu_id, used.index(core.node_id)) for core in picked]


def machine_memory_bytes() -> int:
    """Memory of this machine, or of the container around this process where that is less."""
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit_file in _CGROUP_MEMORY:
        try:
            text = limit_file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total_bytes = min(total_bytes, int(text))
    return total_bytes


def last_level_cache_bytes() -> int:
    """Of one core's largest cache, however many cores share it; 0 where the kernel does not say."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(size.rstrip("KM")) << (20 if size.endswith("M") else 10) for size in sizes), default=0)


def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
