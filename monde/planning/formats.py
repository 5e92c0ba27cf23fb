"""Formats that weights can be run in, as data: what else can be run is a line more here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFormat:
    """name: on the command line. bits: of one weight, scales included. dtype: torch's name for what loading takes."""

    name: str
    bits: float
    dtype: str


# From the most precise; of equal bits first what has fp32's range.
FORMATS = (
    WeightFormat("fp32", 32, "float32"),
    WeightFormat("bf16", 16, "bfloat16"),
    WeightFormat("fp16", 16, "float16"),
)


def format_named(name: str) -> WeightFormat:
    """Errors: ValueError for a format that monde cannot run."""
    for weight_format in FORMATS:
        if weight_format.name == name:
            return weight_format
    raise ValueError(f"format: expected one of {', '.join(f.name for f in FORMATS)}, got {name!r}")


def format_of(dtype: str) -> WeightFormat:
    """The format of a torch dtype, by its name. Errors: ValueError for one that monde cannot run."""
    for weight_format in FORMATS:
        if weight_format.dtype == dtype:
            return weight_format
    raise ValueError(
        f"format: weights in {dtype} cannot be run; give one of {', '.join(f.name for f in FORMATS)}"
    )


def best_format(stored: WeightFormat, fitting: Collection[WeightFormat]) -> WeightFormat | None:
    """The stored one if it fits, else the most precise that fits with fewer bits; more bits than stored tell nothing."""
    narrower = (f for f in FORMATS if f.bits < stored.bits)
    return next((f for f in (stored, *narrower) if f in fitting), None)
