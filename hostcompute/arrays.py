"""Arrays of any library as one record: address, shape, strides, element type.

NumPy arrays (ml_dtypes bfloat16 included), torch CPU tensors and DLPack producers are accepted; nothing is
copied. torch is recognised by shape (`data_ptr`, `stride`), so it never has to be importable.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_ITEMSIZE_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "i32": 4, "i64": 8}
_NAMES = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float64": "f64",
    "int32": "i32",
    "int64": "i64",
}
FLOATS = ("float32", "bfloat16", "float16")
IDS = ("int64", "int32")
_NUMPY = {"f32": "<f4", "bf16": "<u2", "f16": "<f2", "f64": "<f8", "i32": "<i4", "i64": "<i8"}


class HostArray(NamedTuple):
    """A view of host memory. `strides` count elements; `owner` keeps the memory alive.

    A NamedTuple, for one is made per argument of every forward and a frozen dataclass takes four times as long.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str  # a key of _ITEMSIZE_BYTES
    owner: Any

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def has_unit_stride_rows(self) -> bool:
        return 0 in self.shape or self.shape[-1] == 1 or self.strides[-1] == 1

    @property
    def has_overlapping_rows(self) -> bool:
        """Of a matrix: whether two rows share elements, as broadcast ones do."""
        num_rows, num_columns = self.shape
        return num_rows > 1 and abs(self.strides[0]) < num_columns

    def numpy(self) -> npt.NDArray[Any]:
        """The same memory as a NumPy array; bf16 appears as its uint16 bit patterns."""
        if 0 in self.shape:
            return np.empty(self.shape, dtype=_NUMPY[self.dtype])
        item_bytes = _ITEMSIZE_BYTES[self.dtype]
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        raw: Any = (ctypes.c_char * (extent * item_bytes)).from_address(self.address)
        raw.owner = self.owner  # the array and its views keep the memory alive
        flat = np.frombuffer(raw, dtype=_NUMPY[self.dtype])
        strides_bytes = tuple(s * item_bytes for s in self.strides)
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides_bytes)

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as float32 (exact for every type here but f64)."""
        bits = self.numpy()
        if self.dtype == "bf16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        return bits.astype(np.float32)


def bf16_bits(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint16]:
    """Round float32 values to the nearest bf16 (ties to even; NaN stays NaN), as bit patterns."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def row_major(array: HostArray, dtype: str) -> HostArray:
    """The same values as `dtype` (f32, bf16 or f16) with rows of unit stride.

    That is `array` itself if it has this form already, else a rounded, contiguous copy.
    """
    if array.dtype == dtype and array.has_unit_stride_rows:
        return array
    if array.dtype == dtype:
        values = np.ascontiguousarray(array.numpy())
    elif dtype == "bf16":
        values = bf16_bits(array.float32())
    else:
        with np.errstate(over="ignore"):  # too large for f16 becomes infinity, as in every conversion
            values = np.ascontiguousarray(array.float32(), dtype=_NUMPY[dtype])
    strides = tuple(s // values.itemsize for s in values.strides)
    return HostArray(values.ctypes.data, values.shape, strides, dtype, values)


def as_host_array(value: Any, what: str, types: tuple[str, ...] = FLOATS) -> HostArray:
    """View `value`, of one of `types`, as a HostArray. `what` names the argument in errors.

    Errors: TypeError for what is no array; ValueError for other types, other memory, and views whose bytes are not
    their values.
    """
    if isinstance(value, HostArray):
        if value.dtype not in map(_NAMES.__getitem__, types):
            raise _wrong_type(value.dtype, what, types)
        return value
    if hasattr(value, "data_ptr") and hasattr(value, "stride"):
        if not value.is_cpu:
            raise ValueError(
                f"{what}: expected host memory, got a tensor on {value.device}; call .cpu() first"
            )
        dtype = _dtype_name(str(value.dtype).removeprefix("torch."), what, types)
        if value.is_neg():
            raise ValueError(f"{what}: a view that torch negates when it is read; call .resolve_neg() first")
        return HostArray(value.data_ptr(), tuple(value.shape), value.stride(), dtype, value)
    if not isinstance(value, np.ndarray):
        if not hasattr(value, "__dlpack__"):
            raise TypeError(
                f"{what}: expected a NumPy array, CPU tensor or DLPack producer, got {type(value).__name__}; "
                "wrap it: numpy.asarray(..., dtype)"
            )
        value = _from_dlpack(value, what)
    dtype = _dtype_name(value.dtype.name, what, types)
    if not value.dtype.isnative:
        raise ValueError(
            f"{what}: {value.dtype.str} has another byte order than this machine; convert it to {types[0]}"
        )
    item_bytes = _ITEMSIZE_BYTES[dtype]
    if any(s % item_bytes for s in value.strides):
        raise ValueError(
            f"{what}: strides {value.strides} are no multiple of the {item_bytes}-byte elements; copy it"
        )
    strides = tuple(s // item_bytes for s in value.strides)
    return HostArray(value.ctypes.data, value.shape, strides, dtype, value)


def _from_dlpack(value: Any, what: str) -> npt.NDArray[Any]:
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError) as error:  # of another device, or a type that NumPy lacks, as bfloat16
        raise ValueError(
            f"{what}: NumPy cannot read this {type(value).__name__} ({error}); give it in host memory, bfloat16 as a "
            "torch tensor: torch.from_dlpack(...)"
        ) from error


def _dtype_name(name: str, what: str, types: tuple[str, ...]) -> str:
    if name not in types:
        raise _wrong_type(name, what, types)
    return _NAMES[name]


def _wrong_type(got: str, what: str, types: tuple[str, ...]) -> ValueError:
    expected = f"{', '.join(types[:-1])} or {types[-1]}" if len(types) > 1 else types[0]
    return ValueError(f"{what}: expected {expected}, got {got}; convert it to {types[0]}")


def empty_like(x: Any, what: str) -> Any:
    """An uninitialised array of the same kind, shape and type as `x`."""
    if isinstance(x, np.ndarray):
        return np.empty_like(x, order="C", subok=False)
    if hasattr(x, "new_empty"):
        return x.new_empty(tuple(x.shape))
    raise TypeError(f"{what}: cannot make one like a {type(x).__name__}; pass out=, or NumPy arrays")
