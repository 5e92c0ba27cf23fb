"""What a benchmark leaves behind: configuration, commit, machine, versions and every raw sample, as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "torch", "numba", "transformers", "monde")
ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "amx_tile",
)


def write(
    name: str, configuration: dict[str, Any], results: Any, out: Path | None = None, failure: str = ""
) -> Path:
    """Write one artefact, by default to bench/results/<name>-<cpu>-<time>.json, and return where.

    failure: why the run ended before all was measured.
    """
    cpu = machine()
    if out is None:
        model = "".join(c if c.isalnum() else "-" for c in cpu["model"]).strip("-")
        out = RESULTS / f"{name}-{model}-{cpu['num_cpus']}t-{time.strftime('%Y%m%d-%H%M%S')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "configuration": without_folders(configuration),
        "command": without_folders([os.path.relpath(sys.argv[0], RESULTS.parents[1]), *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "machine": cpu,
        "versions": versions(),
        **({"failure": failure} if failure else {}),
        "results": results,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    return out


@contextmanager
def kept(
    name: str,
    configuration: dict[str, Any],
    results: Callable[[], Any],
    out: Path | None = None,
) -> Iterator[None]:
    """`write` what is there when the block ends, whatever ends it, a time limit's SIGTERM among it.

    Where it ended early the artefact says why, and the run fails all the same.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    failure = ""
    try:
        yield
    except BaseException as error:
        traceback.print_exc()
        failure = repr(error)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is there is written, whoever is in a hurry
    where = write(name, configuration, results(), out, failure)
    signal.signal(signal.SIGTERM, before)
    print(f"\nartefact: {where}", flush=True)
    if failure:
        raise SystemExit(f"the run ended early: {failure}")


def without_folders(value: Any) -> Any:
    """The same with absolute paths cut to their last part: where files lay is nobody's business."""
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    return re.sub(r"(^|=)/(?:[^/]+/)*", r"\1", value) if isinstance(value, str) else value


def machine() -> dict[str, Any]:
    """CPU, NUMA nodes, caches, memory and pages, as the kernel states them."""
    described = dict(
        line.split(":", 1)
        for line in _read("/proc/cpuinfo").split("\n\n")[0].replace("\t", "").splitlines()
        if ":" in line
    )
    flags = described.get("flags", "").split()
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _read(index / "type")
        caches[f"L{_read(index / 'level')} {kind}"] = (
            f"{_read(index / 'size')} shared by {_read(index / 'shared_cpu_list')}"
        )
    memory = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    return {
        "model": described.get("model name", platform.processor()).strip(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "isa_flags": [flag for flag in ISA_FLAGS if flag in flags],
        "caches": caches,
        "numa_nodes": {
            p.name: _read(p / "cpulist") for p in sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
        },
        "memory": {
            key: memory[key].strip()
            for key in ("MemTotal", "MemAvailable", "HugePages_Total")
            if key in memory
        },
        "transparent_huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "kernel": platform.release(),
        "load_average": os.getloadavg(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The commit that ran, marked when files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).parent.parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-modified" if changed.stdout.strip() else "")


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
