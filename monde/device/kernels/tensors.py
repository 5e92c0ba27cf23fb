"""What kernels ask of tensors before they are launched."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from monde.device.kernels import ELEMENT_TYPES

VECTOR_BYTES = 16  # of a load


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the device is a GPU whose instructions go with both half types and whole warps, sm_80 and newer, and CuPy
    is there to compile for it."""
    if device.type != "cuda" or importlib.util.find_spec("cupy") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def alike(*tensors: Tensor) -> bool:
    """All on one such GPU, and of one type that kernels take."""
    first = tensors[0]
    same = all(x.dtype is first.dtype and x.device == first.device for x in tensors)
    return same and first.dtype in ELEMENT_TYPES and has_kernels(first.device)


def in_vectors(*tensors: Tensor) -> bool:
    """Whether rows of the last dim can be read 16 bytes at a time."""
    return all(
        x.stride(-1) == 1
        and x.data_ptr() % VECTOR_BYTES == 0
        and all(stride * x.element_size() % VECTOR_BYTES == 0 for stride in strides(x)[:-1])
        for x in tensors
    )


def strides(x: Tensor) -> tuple[int, ...]:
    """0 for dims of one: torch leaves any number there."""
    return tuple(stride if n > 1 else 0 for n, stride in zip(x.shape, x.stride(), strict=True))
