"""What the jitted kernels need and numba does not offer: atomics, views of addresses, widening.

All are plain LLVM, so they hold on any CPU that numba supports.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array


def _element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    view = make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, view, [index])


@intrinsic
def fetch_add(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] += value, atomically; the value before. `array` is int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def load_acquire(_typing: Any, array: Any, index: Any) -> Any:
    """array[index], read so that what was written before the matching fetch_add is visible."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, signature.args[0], args[0], args[1])
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def yield_cpu(_typing: Any) -> Any:
    """Let another thread of this core run: a waiting thread must not starve the one it waits for."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def as_pointer(_typing: Any, address: Any) -> Any:
    """An integer address as the void pointer that numba.carray takes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), codegen


@intrinsic
def _bits_as_f32(_typing: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


def widen(stored: Any) -> Any:
    """A stored weight as float32, exactly: uint16 holds bf16 bits, int16 holds f16 bits, float32 is itself.

    Finite values only (the bank refuses others), which saves the test for f16 infinities.
    """
    raise AssertionError("runs jitted only")


@overload(widen)
def _widen(stored: Any) -> Any:
    bias = np.uint32(112 << 23)  # f32 and f16 exponents differ by 127 - 15
    smallest_bits = np.uint32(113 << 23)  # 2^-14, where f16 becomes subnormal

    def from_f32(stored: Any) -> Any:
        return stored

    def from_bf16(stored: Any) -> Any:
        return _bits_as_f32(np.uint32(stored) << np.uint32(16))

    def from_f16(stored: Any) -> Any:
        magnitude = np.uint32(np.uint32(stored) & np.uint32(0x7FFF)) << np.uint32(13)
        # A subnormal becomes the fraction of 2^-14 and loses the implied one: no denormal arithmetic, so no
        # slow path.
        subnormal = _bits_as_f32(magnitude + smallest_bits) - _bits_as_f32(smallest_bits)
        value = _bits_as_f32(magnitude + bias) if magnitude >= np.uint32(1 << 23) else subnormal
        return -value if stored < 0 else value

    return {types.float32: from_f32, types.uint16: from_bf16, types.int16: from_f16}[stored]
