"""The environment variables, all of them, read in this one place: monde's three, and where the system keeps caches."""

from __future__ import annotations

import os
from pathlib import Path

NAMES = ("MONDE_CPU_ISA", "MONDE_NUM_THREADS", "MONDE_DEBUG")


def forced_isa() -> str | None:
    """MONDE_CPU_ISA: the one instruction set that native kernels may use."""
    return os.environ.get("MONDE_CPU_ISA") or None


def num_threads() -> int | None:
    """MONDE_NUM_THREADS: threads of the shared pool. Errors: ValueError unless a positive integer."""
    text = os.environ.get("MONDE_NUM_THREADS")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"MONDE_NUM_THREADS: expected a positive integer, got {text!r}; unset it to use every core"
        )
    return int(text)


def debug() -> bool:
    """MONDE_DEBUG: let the command line show tracebacks."""
    return bool(os.environ.get("MONDE_DEBUG"))


def cache_home() -> Path:
    """XDG_CACHE_HOME, or ~/.cache; a path that is not absolute counts as none, as the XDG specification has it."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".cache"


def in_force() -> dict[str, str]:
    """The variables that are set, and to what."""
    return {name: os.environ[name] for name in NAMES if os.environ.get(name)}
