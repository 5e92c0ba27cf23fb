"""Sizes of memory, and other numbers, as people write and read them."""

from __future__ import annotations

import re

_UNITS_BYTES = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "PIB": 2**50,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_size_bytes(size: int | str, what: str) -> int:
    """ "16GiB", "500MB" or a number of bytes, as accelerate's `max_memory` takes them.

    Errors: ValueError naming `what` for anything else, negative sizes included.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise ValueError(f"{what}: expected a size of at least 0, got {size}")
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = match.group(2).upper() if match else ""
    if match is None or unit not in {*_UNITS_BYTES, ""} or (unit == "" and "." in match.group(1)):
        raise ValueError(
            f'{what}: cannot read {size!r} as a size; write it as "16GiB", "500MB" or a number of bytes'
        )
    return int(float(match.group(1)) * _UNITS_BYTES[unit]) if unit else int(match.group(1))


def format_bytes(num_bytes: int) -> str:
    """A size for people: three significant digits and a binary unit."""
    value, sign = float(abs(num_bytes)), "-" if num_bytes < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            return f"{sign}{value:.0f} B" if unit == "B" else f"{sign}{value:.3g} {unit}"
        value /= 1024
    return f"{sign}{value:.3g} PiB"


def format_number(value: float) -> str:
    """Three significant digits, never as a power of ten from 0.001 on: 0.123, 9.5, 1,130, 2,000,000."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"
