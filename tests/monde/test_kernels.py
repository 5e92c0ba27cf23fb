"""What of the GPU kernels can be checked without a GPU: they compile, and the record is the struct they read."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hostcompute import ActivationKind
from monde.device.kernels import ELEMENT_TYPES, compile_options, cubins, decode_source
from monde.device.kernels.attention import DTYPES, attention_source, num_groups
from monde.device.kernels.launch import bytes_of
from monde.device.kernels.panels import (
    MMA,
    WGMMA,
    Form,
    Kind,
    form_of,
    panels_options,
    panels_source,
)
from monde.device.kernels.prefill import prefill_source
from monde.device.kernels.step import step_source
from monde.device.kernels.tensors import has_kernels
from monde.device.layer_record import CONSTANTS, FIELDS, LAYER

TYPES = list(ELEMENT_TYPES)


def compiled(source: str, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    built(source, ("-arch=sm_80", *compile_options(x_dtype, weight_dtype)))


def built(source: str, options: tuple[str, ...]) -> str:
    """What the compiler says."""
    pytest.importorskip(
        "cupy", reason="NVRTC comes with CuPy: pip install monde[cuda13]", exc_type=ImportError
    )
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "kernels.cu", [], [])
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    return str(nvrtc.getProgramLog(program))


@pytest.mark.parametrize("x_dtype", TYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", TYPES, ids=str)
def test_decode_kernels_compile(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    pytest.importorskip("hostcompute._native")
    compiled(decode_source(), x_dtype, weight_dtype)


@pytest.mark.parametrize("x_dtype", TYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", TYPES, ids=str)
def test_prefill_kernels_compile(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    compiled(prefill_source(), x_dtype, weight_dtype)


@pytest.mark.parametrize(
    "of", [Kind(ActivationKind.SWIGLU_ALPHA, True), Kind(ActivationKind.RELU2, False), None], ids=str
)
@pytest.mark.parametrize("form", [MMA, WGMMA], ids=["mma", "wgmma"])
def test_panels_compile_without_spilling(form: Form, of: Kind | None) -> None:
    """And wgmmas run side by side: where the compiler cannot have that it says so."""
    options = (f"-arch={form.arch or 'sm_80'}", *cubins.AS_CUPY, *panels_options(of), "--ptxas-options=-v")
    log = built(panels_source(form), options)
    assert "0 bytes spill stores, 0 bytes spill loads" in log, log
    assert "serialized" not in log, log


@pytest.mark.parametrize(
    ("capability", "form"), [((7, 5), None), ((8, 0), MMA), ((8, 9), MMA), ((9, 0), WGMMA), ((12, 0), MMA)]
)
def test_wgmma_is_for_hopper_alone(
    capability: tuple[int, int], form: Form | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert form_of(torch.device("cuda", 0)) is form


def cubin() -> Path:
    assert WGMMA.arch is not None
    return cubins.cubin(panels_source(WGMMA), WGMMA.arch, panels_options(None))


def test_hoppers_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where the file is not what was written."""
    pytest.importorskip("cupy", exc_type=ImportError)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cubin()
    written = path.read_bytes()
    path.write_bytes(written[:-9])
    assert cubin() == path
    assert path.read_bytes() == written
    monkeypatch.setattr(cubins, "_compiled", lambda *_: pytest.fail("it is there"))
    assert cubin() == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy", exc_type=ImportError)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cubins, "_compiled", lambda *_: b"cubin")
    with pytest.warns(RuntimeWarning, match="set XDG_CACHE_HOME"):
        path = cubin()
    assert path.read_bytes() == b"cubin"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_step_kernels_compile(dtype: torch.dtype) -> None:
    compiled(step_source(), dtype, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "dims", [(128, 128, 8), (64, 64, 40), (192, 128, 1), (256, 256, 16), (24, 16, 1)], ids=str
)
def test_attention_compiles(dims: tuple[int, int, int], dtype: torch.dtype) -> None:
    key_dim, value_dim, heads_per_kv = dims
    groups = num_groups(heads_per_kv, key_dim, value_dim)
    compiled(attention_source(key_dim, value_dim, groups), dtype, dtype)


IN_STEPS = [decode_source, step_source, lambda: attention_source(128, 128, 1)]


@pytest.mark.parametrize("source", IN_STEPS)
def test_kernels_of_steps_compile_where_they_begin_early(source: Callable[[], str]) -> None:
    pytest.importorskip("hostcompute._native")
    built(source(), ("-arch=sm_90", *compile_options(torch.bfloat16, torch.bfloat16)))


@pytest.mark.parametrize("source", IN_STEPS)
def test_every_block_awaits_what_was_launched_before(source: Callable[[], str]) -> None:
    """Before it may return, meets its block's others or counts itself in."""
    pytest.importorskip("hostcompute._native")
    bodies = source().split('extern "C" __global__')[1:]
    assert bodies
    for body in bodies:
        before, awaits, _ = body.partition("await_earlier_launches();")
        assert awaits, body[:200]
        assert not re.search(r"\breturn\b|__syncthreads|atomic", before), before


@pytest.mark.parametrize(
    ("argument", "size"),
    [
        (1 << 40, 8),
        (np.int32(7), 4),
        (np.float32(0.5), 4),
        (LAYER.of(dict.fromkeys((*FIELDS, *CONSTANTS), 1)), 8 * len((*FIELDS, *CONSTANTS))),
    ],
)
def test_arguments_are_passed_at_their_width(argument: Any, size: int) -> None:
    passed = bytes_of(argument)
    assert len(passed) == size
    assert np.frombuffer(passed, getattr(argument, "dtype", np.int64)) == argument


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


@pytest.mark.parametrize(
    ("capability", "cupy", "has"), [((9, 0), True, True), ((7, 5), True, False), ((9, 0), False, False)]
)
def test_which_gpus_have_kernels(
    capability: tuple[int, int], cupy: bool, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without CuPy a GPU takes what was there before, as everywhere in monde."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if cupy else None)
    assert has_kernels.__wrapped__(torch.device("cuda", 0)) is has
    assert not has_kernels(torch.device("cpu"))
