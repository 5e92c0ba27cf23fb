"""What of the GPU kernels can be checked without a GPU: they compile, and the record is the struct they read."""

from __future__ import annotations

import struct

import pytest
import torch

from monde.device.kernels import ELEMENT_TYPES, compile_options, decode_source
from monde.device.kernels.prefill import prefill_source
from monde.device.layer_record import CONSTANTS, FIELDS, LAYER


@pytest.mark.parametrize("x_dtype", list(ELEMENT_TYPES), ids=str)
@pytest.mark.parametrize("weight_dtype", list(ELEMENT_TYPES), ids=str)
def test_every_pair_of_types_compiles(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    pytest.importorskip("hostcompute._native")
    pytest.importorskip(
        "cupy", reason="NVRTC comes with CuPy: pip install monde[cuda13]", exc_type=ImportError
    )
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(decode_source(), "decode.cu", [], [])
    try:
        nvrtc.compileProgram(program, ("-arch=sm_80", *compile_options(x_dtype, weight_dtype)))
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))


def test_the_record_holds_what_it_is_given_where_the_struct_has_it() -> None:
    values = {name: 3 * i for i, name in enumerate(FIELDS)} | dict.fromkeys(CONSTANTS, 0.5)
    packed = LAYER.of(values).tobytes()
    assert packed == struct.pack(f"<{len(FIELDS)}q{len(CONSTANTS)}d", *values.values())
    assert [word.rstrip(";") for word in LAYER.c_struct().split() if word.endswith(";")][:-1] == [
        *FIELDS,
        *CONSTANTS,
    ]


def test_a_record_with_other_fields_is_refused() -> None:
    values = dict.fromkeys((*FIELDS, *CONSTANTS), 0) | {"nonsense": 1}
    del values["state"]
    with pytest.raises(KeyError, match=r"\['nonsense', 'state'\]"):
        LAYER.of(values)


@pytest.mark.parametrize("x_dtype", list(ELEMENT_TYPES), ids=str)
@pytest.mark.parametrize("weight_dtype", list(ELEMENT_TYPES), ids=str)
def test_prefill_kernels_compile(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    pytest.importorskip(
        "cupy", reason="NVRTC comes with CuPy: pip install monde[cuda13]", exc_type=ImportError
    )
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(prefill_source(), "prefill.cu", [], [])
    try:
        nvrtc.compileProgram(program, ("-arch=sm_80", *compile_options(x_dtype, weight_dtype)))
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
