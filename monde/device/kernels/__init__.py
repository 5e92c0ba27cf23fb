"""CUDA C++ sources, compiled by CuPy (NVRTC) at first use; CuPy keeps the binaries in its cache on disk."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

from hostcompute import ActivationKind
from monde.device.kernels.launch import Kernel
from monde.device.layer_record import LAYER

# Joined in this order.
SOURCES = ("elements.cuh", "overlap.cuh", "product.cuh", "activation.cuh", "decode.cu")
MAX_EXPERTS = 1024  # of one layer; sizes an array in shared memory
SHARE_ONE = 1 << 16  # the state's share of F in these parts
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# 64-bit words of device memory that the layers of a model share.
STATE_WORDS = (
    # LEFT_RING: with which the latest layer gave the host pairs for later, EARLIER_RING the one before it; 0: none.
    *(
        "RING",
        "TICKET",
        "COLD",
        "LATER",
        "LEFT_RING",
        "EARLIER_RING",
        "FAILED",
        "DEADLINE_NS",
        "SHARE",
        "SHARED_PANELS",
        "ROUTED_NS",
        "GPU_NS",
    ),
    *("COLD_PAIRS", "RESIDENT_PAIRS", "POSTED_TOKENS", "ANSWERED_TOKENS", "SHARED_BYTES"),  # counters
)
ACTIVATION_CODES = {kind: code for code, kind in enumerate(ActivationKind)}


@dataclass(frozen=True)
class DecodeKernels:
    """The kernels of decode.cu."""

    route: Kernel
    gate_up: Kernel
    down: Kernel
    combine: Kernel
    collect: Kernel


def decode_source() -> str:
    """decode.cu, behind what it is made of and the constants it takes from here and from the native module."""
    from hostcompute import _native

    ring = {f"RING_{name}": value for name, value in _native.ring_layout().items()}
    state = {f"STATE_{name}": index for index, name in enumerate(STATE_WORDS)}
    kinds = {f"KIND_{kind.name}": code for kind, code in ACTIVATION_CODES.items()}
    constants = {"MAX_EXPERTS": MAX_EXPERTS, "SHARE_ONE": SHARE_ONE} | ring | state | kinds
    lines = [f"constexpr int {name} = {value};" for name, value in constants.items()]
    parts = (Path(__file__).with_name(name).read_text() for name in SOURCES)
    return "\n".join((*lines, LAYER.c_struct(), *parts))


def activation_source() -> str:
    """activation.cuh behind what it is made of, where activations are those of one call; elements.cuh besides."""
    kinds = (f"constexpr int KIND_{kind.name} = {code};" for kind, code in ACTIVATION_CODES.items())
    layer = "struct Layer { int activation, gated; double limit, alpha; };"
    parts = (Path(__file__).with_name(name).read_text() for name in ("elements.cuh", "activation.cuh"))
    return "\n".join((*kinds, layer, *parts))


def compile_options(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[str, ...]:
    return ("-std=c++17", f"-DX={ELEMENT_TYPES[x_dtype]}", f"-DW={ELEMENT_TYPES[weight_dtype]}")


@cache
def decode_kernels(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> DecodeKernels:
    """Compiled for the current device. Errors: ImportError without CuPy."""
    import cupy

    module = cupy.RawModule(code=decode_source(), options=compile_options(x_dtype, weight_dtype))
    return DecodeKernels(*(Kernel(module.get_function(field.name)) for field in fields(DecodeKernels)))
