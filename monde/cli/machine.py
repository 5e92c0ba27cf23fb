"""The machine and the versions a measurement was made with, and `why not` where something is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

import monde
from hostcompute.topology import cpu_name


@dataclass(frozen=True)
class Machine:
    """Hardware, software and commit of one run."""

    cpu: str
    num_cores: int  # physical
    memory_bytes: int
    gpu: str | None
    python: str
    versions: dict[str, str]  # package -> version
    commit: str  # "" outside a git checkout; "-dirty" when tracked files differ

    @classmethod
    def here(cls) -> Machine:
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
        return cls(
            cpu=cpu_name(),
            num_cores=psutil.cpu_count(logical=False) or 1,
            memory_bytes=psutil.virtual_memory().total,
            gpu=gpu,
            python=platform.python_version(),
            versions={"monde": monde.__version__, **versions},
            commit=commit(),
        )


def commit() -> str:
    """The short commit of the checkout this file lies in, with -dirty when tracked files were changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_ceiling(num_threads: int | None) -> float | None:
    """Bytes per second of the plain read test; None where the native module is missing, which measures it."""
    from hostcompute import read_bandwidth

    try:
        return read_bandwidth(num_threads)
    except ImportError:
        return None


def huge_pages() -> str:
    """How this kernel hands out huge pages, in words."""
    mode_file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        mode = mode_file.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "transparent huge pages: not offered by this kernel"
    return f"transparent huge pages: {mode}"


def cuda_or_why_not() -> str:
    import torch

    if torch.cuda.is_available():
        free_gib, total_gib = (num_bytes / 2**30 for num_bytes in torch.cuda.mem_get_info())
        cupy = (
            "with CuPy"
            if importlib.util.find_spec("cupy")
            else "without CuPy (pip install 'monde[cuda12]' or 'monde[cuda13]')"
        )
        return f"{torch.cuda.get_device_name()}, {free_gib:.1f} of {total_gib:.1f} GiB free, {cupy}"
    if torch.version.cuda is None:
        return (
            f"no: torch {torch.__version__} is built without CUDA; install a CUDA build of torch to use a GPU"
        )
    return f"no: torch {torch.__version__} finds no GPU; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
