"""Every backend, and for native every ISA, that this machine can run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest

from hostcompute import DType, ExpertBank, ExpertSpec

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")
# Multiply bf16 x by bf16 weights in pairs, and round the hidden values for it; f32 and f16 x keep fp32.
BF16_DOT_ISAS = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Contender:
    """One way to compute a forward."""

    backend: str
    isa: str | None

    def bank(self, spec: ExpertSpec) -> ExpertBank:
        kwargs: dict[str, Any] = {} if self.isa is None else {"isa": self.isa}
        return ExpertBank(spec, backend=self.backend, **kwargs)

    def bf16_dots(self, spec: ExpertSpec, x_dtype: str) -> bool:
        """Whether activations are rounded to bf16 before they meet the weights."""
        return spec.dtype is DType.BF16 and x_dtype == "bf16" and self.isa in BF16_DOT_ISAS


def _missing(contender: Contender) -> str | None:
    """Why this machine cannot run it, or None."""
    if contender.backend == "numba":
        return None if importlib.util.find_spec("numba") else "numba is not installed"
    try:
        from hostcompute import _native
    except ImportError as error:
        return f"hostcompute._native is not built: {error}"
    available = _native.available_isas()
    return (
        None
        if contender.isa in available
        else f"this machine has no {contender.isa}, only {', '.join(available)}"
    )


CONTENDERS = [Contender("numba", None), *(Contender("native", isa) for isa in ISAS)]


@pytest.fixture(scope="session", params=CONTENDERS, ids=lambda c: c.isa or c.backend)
def contender(request: pytest.FixtureRequest) -> Contender:
    missing = _missing(request.param)
    if missing:
        pytest.skip(missing)
    chosen: Contender = request.param
    return chosen


@pytest.fixture(scope="session", params=["reference", "numba", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """For what must hold of every backend, whatever its ISA."""
    name: str = request.param
    if name == "native" and importlib.util.find_spec("hostcompute._native") is None:
        pytest.skip("hostcompute._native is not built")
    return name
