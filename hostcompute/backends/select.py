"""Which backend runs, and why: asked for by name, or the fastest one that is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hostcompute import env
from hostcompute.backends.base import Backend
from hostcompute.backends.reference import ReferenceBackend
from hostcompute.places import HostPlaces
from hostcompute.spec import ExpertSpec

BACKENDS = ("native", "numba", "reference")


@dataclass(frozen=True)
class BackendChoice:
    """The backend that runs, its instruction set and the reason."""

    name: str
    isa: str
    why: str
    # spec, pool, places: native alone uses those
    build: Callable[[ExpertSpec, Any, HostPlaces | None], Backend] = field(repr=False)


def choose(name: str = "auto", isa: str | None = None) -> BackendChoice:
    """`isa` forces one instruction set of the native backend, as MONDE_CPU_ISA does for every bank.

    Errors: ValueError for an unknown name, RuntimeError when the named backend or ISA cannot run here.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected auto, {', '.join(BACKENDS)}, got {name!r}")
    asked = "asked for by name"
    if name == "native":
        return _native(asked, isa)
    forced = isa or env.forced_isa()
    if name == "auto":
        try:
            return _native("native is the fastest backend", isa)
        except NativeMissing as error:
            if forced:
                raise RuntimeError(f"ISA {forced} needs the native backend, but {error}") from error
            return _numba(str(error))
    if forced:
        warnings.warn(f"ISA {forced} has no effect: backend={name!r} is not native", stacklevel=3)
    return _numba(asked) if name == "numba" else _reference(asked)


class NativeMissing(RuntimeError):
    """The native module was not built for this Python or machine."""


def _native(why: str, isa: str | None) -> BackendChoice:
    try:
        from hostcompute.backends.native import NativeBackend, choose_isa
    except ImportError as error:
        raise NativeMissing(
            f"the native backend is not available ({error}); install a wheel, or build it: `pip install .`"
        ) from error
    chosen, isa_why = choose_isa(isa)
    return BackendChoice(
        "native",
        chosen,
        f"{why}; {isa_why}",
        lambda spec, pool, places: NativeBackend(spec, pool, chosen, places),
    )


def _numba(why: str) -> BackendChoice:
    try:
        import numba
    except ImportError as error:
        raise RuntimeError(
            f"the numba backend is not available ({error}); install it with `pip install numba`"
        ) from error

    def build(spec: ExpertSpec, pool: Any, places: HostPlaces | None) -> Backend:
        from hostcompute.backends.numba_backend import NumbaBackend

        return NumbaBackend(spec, None if pool is None else pool.num_threads)

    return BackendChoice("numba", f"numba-{numba.__version__}", why, build)


def _reference(why: str) -> BackendChoice:
    return BackendChoice("reference", "numpy-float64", why, lambda spec, pool, places: ReferenceBackend(spec))
