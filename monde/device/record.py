"""What a kernel is told in one argument: a record, passed by value, so that kernels find it in constant memory.

The C struct and the bytes are both made from one list of names. Addresses and numbers are 64 bits wide, constants doubles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


class Record:
    def __init__(self, name: str, numbers: Sequence[str], constants: Sequence[str]) -> None:
        self.name, self._numbers, self._constants = name, tuple(numbers), tuple(constants)
        self._dtype = np.dtype([(n, np.int64) for n in numbers] + [(c, np.float64) for c in constants])

    def c_struct(self) -> str:
        """`struct NAME` in C++."""
        numbers = "".join(f"long long {name}; " for name in self._numbers)
        return (
            f"struct {self.name} {{ {numbers}{''.join(f'double {name}; ' for name in self._constants)}}};\n"
        )

    def of(self, values: Mapping[str, int | float]) -> NDArray[np.void]:
        """The record as one value [1] without fields, passed by value: of one with fields CuPy lists them at every launch.

        Errors: KeyError unless `values` has every field, and only those.
        """
        record = np.zeros(1, self._dtype)
        if missing := {*self._numbers, *self._constants} ^ set(values):
            raise KeyError(f"{self.name} record: fields that differ: {sorted(missing)}")
        for name, value in values.items():
            record[name] = value
        return record.view(f"V{record.nbytes}")
