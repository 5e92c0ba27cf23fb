"""Other projects' host kernels as contenders. Each runs in a process of its own for a round and reports JSON.

A ggml harness is any program called as `PROGRAM TYPE BATCH THREADS 0 SECONDS` that prints one JSON line with
`us_med`, the microseconds of a typical step of the layer shape in host_kernels.PEER_SPEC (llama.cpp and
ik_llama.cpp have such a harness around their mul_mat_id operators). kt-kernel and FreeToken are driven by
bench/peer_kt.py, bench/peer_freetoken.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.rounds import Measure


@dataclass(frozen=True)
class Peer:
    """`command` is completed by batch, threads and seconds where it says {batch}, {threads}, {seconds}."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def measure(self, batch: int, num_threads: int) -> Measure:
        """Errors: RuntimeError with the peer's own words when it fails."""

        def measured(seconds_s: float) -> list[float]:
            values = {"batch": batch, "threads": num_threads, "seconds": seconds_s}
            command = [part.format(**values) for part in self.command]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=300,
                env={**os.environ, **dict(self.environment)},
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode or not lines:
                raise RuntimeError(
                    f"peer {self.name} failed ({done.returncode}): {done.stderr.strip()[-300:]}"
                )
            return [json.loads(lines[-1])["us_med"] * 1e-6]

        return measured


def ggml(argument: str) -> Peer:
    """NAME=PATH or NAME:TYPE=PATH, as --peer-ggml takes it; the type defaults to bf16."""
    name, _, path = argument.partition("=")
    if not path:
        raise ValueError(f"--peer-ggml: expected NAME=PATH or NAME:TYPE=PATH, got {argument!r}")
    element_type = name.partition(":")[2] or "bf16"
    return Peer(name, (path, element_type, "{batch}", "{threads}", "0", "{seconds}"))


def kt_kernel(folder: str) -> Peer:
    """`folder` is where `pip install --no-deps --target FOLDER kt-kernel` put it."""
    return Peer("kt-kernel", _script("peer_kt.py"), (("PYTHONPATH", folder),))


def freetoken(shared_object: str) -> Peer:
    """`shared_object` is FreeToken's _cpu_moe extension for this Python."""
    return Peer("freetoken", (*_script("peer_freetoken.py"), shared_object))


def _script(name: str) -> tuple[str, ...]:
    return sys.executable, str(Path(__file__).parent / name), "{batch}", "{threads}", "{seconds}"
