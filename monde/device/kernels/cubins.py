"""Kernels for one architecture and no other, as sm_90a: compiled once, and kept with the user's caches.

CuPy, which does so with everything else, chooses the architecture itself, and never a specific one.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

from hostcompute import env

AS_CUPY = ("-ftz=true", "-default-device")  # what CuPy compiles with besides; NVRTC 12 takes nothing twice


def cubin(source: str, arch: str, options: tuple[str, ...]) -> Path:
    """A file for cupy.RawModule. Errors: RuntimeError with the compiler's words where it cannot make one."""
    from cupy.cuda import nvrtc

    options = (f"-arch={arch}", *AS_CUPY, *options)
    folder, key = _cache_folder(), _digest(repr((nvrtc.getVersion(), options, source)).encode())
    for path in folder.glob(f"{key}-*.cubin"):
        if path.stem == f"{key}-{_digest(path.read_bytes())}":
            return path
    return _keep(folder, key, _compiled(source, options))


def _cache_folder() -> Path:
    """The user's, or, where it cannot be written to, one for as long as this process lasts."""
    try:
        folder = env.cache_home() / "monde" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        warnings.warn(
            f"kernels are compiled anew in every process, for seconds: {error}; set XDG_CACHE_HOME to a folder that "
            "can be written to",
            RuntimeWarning,
            stacklevel=2,
        )
    own = tempfile.TemporaryDirectory(prefix="monde-kernels-")
    atexit.register(own.cleanup)
    return Path(own.name)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _keep(folder: Path, key: str, content: bytes) -> Path:
    """Whole or not at all, whoever writes the same meanwhile; its name tells whether it is what was written."""
    path = folder / f"{key}-{_digest(content)}.cubin"
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
        part.write(content)
    os.replace(part.name, path)
    return path


def _compiled(source: str, options: tuple[str, ...]) -> bytes:
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "kernels.cu", [], [])
    try:
        nvrtc.compileProgram(program, options)
        binary = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(
            f"NVRTC {nvrtc.getVersion()} does not compile monde's kernels with {' '.join(options)}; install a newer "
            f"nvidia-cuda-nvrtc:\n{nvrtc.getProgramLog(program)}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)
    return bytes(binary) + b"\0"  # CuPy takes the last byte for the end of a string
