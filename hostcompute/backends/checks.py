"""Checks that every backend owes its user, stated once."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from hostcompute.arrays import HostArray
from hostcompute.backends.base import ExpertWeights

# Bit pattern of +infinity, its signed and unsigned integer types: patterns from there on, in either sign, are
# not finite.
_INFINITY = {
    "f32": (0x7F800000, np.int32, np.uint32),
    "bf16": (0x7F80, np.int16, np.uint16),
    "f16": (0x7C00, np.int16, np.uint16),
}


def check_finite(expert_id: int, weights: ExpertWeights) -> None:
    """Raise ValueError naming expert, matrix and position of the first NaN or infinity.

    The two maxima run at the speed of memory and need no temporary: as a signed integer the largest pattern
    is the largest positive value, as an unsigned one it is the most negative value, and NaN lies beyond
    infinity in both.
    """
    for name, array in vars(weights).items():
        if array is None:
            continue
        infinity, signed, unsigned = _INFINITY[array.dtype]
        bits = array.numpy()
        if bits.view(signed).max() < infinity and bits.view(unsigned).max() < infinity | _sign_bit(array):
            continue
        first = np.argwhere(~np.isfinite(array.float32()))[0].tolist()
        raise ValueError(
            f"[load] expert {expert_id}: a weight is NaN or infinite: {name}{first}; "
            "the checkpoint is damaged"
        )


def _sign_bit(array: HostArray) -> int:
    return 0x80000000 if array.dtype == "f32" else 0x8000


def check_present(needed: Iterable[int], loaded: Collection[int]) -> None:
    """Raise KeyError naming the experts that a batch needs and nobody loaded."""
    missing = sorted({int(expert_id) for expert_id in needed} - set(loaded))
    if missing:
        raise KeyError(f"[forward] experts {missing} were never loaded into this bank; call load() first")
