"""Formats as data: in step with what the kernels and the loader take, and which one is best."""

from __future__ import annotations

import pytest

from hostcompute import DType
from monde.cli.options import DTypeName
from monde.planning.formats import FORMATS, best_format, format_named, format_of

FP32, BF16, FP16 = FORMATS


def test_every_format_that_runs_is_known() -> None:
    """A new codec fails here until plans know it."""
    assert {f.name.replace("fp", "f") for f in FORMATS} == {dtype.value for dtype in DType}
    assert {f.name for f in FORMATS} == {name.value for name in DTypeName} - {"auto"}
    for weight_format in FORMATS:
        dtype = DType(weight_format.name.replace("fp", "f"))
        assert weight_format.bits == 8 * dtype.itemsize_bytes


def test_the_stored_format_is_best_where_it_fits() -> None:
    for stored in FORMATS:
        assert best_format(stored, FORMATS) is stored


def test_else_the_most_precise_of_fewer_bits() -> None:
    assert best_format(FP32, [FP16, BF16]) is BF16
    assert best_format(FP32, [FP16]) is FP16
    assert best_format(BF16, [FP16]) is None  # as many bits, and less range
    assert best_format(BF16, [FP32]) is None
    assert best_format(FP32, []) is None


def test_names() -> None:
    assert format_named("bf16") is format_of("bfloat16") is BF16
    with pytest.raises(ValueError, match="expected one of fp32, bf16, fp16, got 'int3'"):
        format_named("int3")
    with pytest.raises(ValueError, match="weights in float8_e4m3fn cannot be run"):
        format_of("float8_e4m3fn")
