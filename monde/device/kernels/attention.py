"""attention.cu as a call over tensors; compiled at first use, once for each type and head.

Letters: B sequences, H query heads, N key-value heads, S keys, C dims of a key, V dims of a value.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from monde.device.kernels import compile_options
from monde.device.kernels.launch import Kernel
from monde.device.kernels.tensors import alike, in_vectors
from monde.device.record import Record
from monde.device.streams import current_stream

SOURCES = ("elements.cuh", "overlap.cuh", "attention.cu")  # joined in this order
DTYPES = (torch.bfloat16, torch.float16)
MAX_DIM = 256
BLOCK_KEYS = 128  # kBlockKeys of attention.cu
_WARPS = 4  # kAttendWarps
_VECTOR = 8  # elements of a load
_MAX_SPLITS = 64  # that a thread of `join` adds up
_BLOCKS_PER_SM = 4
_LOG2_E = 1.4426950408889634
_ATTENTION = Record(
    "Attention",
    """queries keys values mask y sums parts query_row query_head key_row key_head key_stride
    value_row value_head value_stride mask_row num_keys num_heads heads_per_kv""".split(),  # noqa: SIM905
    ("scale",),
)


def attention_source(key_dim: int, value_dim: int, groups: int) -> str:
    constants = {"KEY_DIM": key_dim, "VALUE_DIM": value_dim, "GROUPS": groups, "MAX_SPLITS": _MAX_SPLITS}
    lines = [f"constexpr int {name} = {value};" for name, value in constants.items()]
    parts = (Path(__file__).with_name(name).read_text() for name in SOURCES)
    return "\n".join((*lines, _ATTENTION.c_struct(), *parts))


@cache
def _functions(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, groups: int
) -> tuple[Kernel, Kernel]:
    """attend and join. Errors: ImportError without CuPy."""
    import cupy

    code = attention_source(key_dim, value_dim, groups)
    module = cupy.RawModule(code=code, options=compile_options(dtype, dtype))
    attend, join = (module.get_function(name) for name in ("attend", "join"))
    with torch.cuda.device(device):  # the attribute is one of a device
        attend.max_dynamic_shared_size_bytes = _shared_bytes(value_dim, groups)
    return Kernel(attend), Kernel(join)


def _shared_bytes(value_dim: int, groups: int) -> int:
    return _WARPS * 8 * groups * value_dim * 4


def num_groups(heads_per_kv: int, key_dim: int, value_dim: int) -> int:
    """Blocks of eight query heads that one block of threads holds: two where they fit its registers."""
    return 2 if heads_per_kv > 8 and max(key_dim, value_dim) <= 128 else 1


def num_splits(num_keys: int, num_blocks: int, num_sms: int) -> int:
    """How many blocks of threads share out the keys where there are `num_blocks` without that."""
    at_once = _BLOCKS_PER_SM * num_sms // num_blocks  # no second wave of a few blocks
    return max(1, min(-(-num_keys // BLOCK_KEYS), at_once, _MAX_SPLITS))


def can_attend(query_BHTC: Tensor, key_BNSC: Tensor, value_BNSV: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` takes these: one query of every sequence, half wide, in rows of whole vectors."""
    B, H, T, C = query_BHTC.shape
    N, S = key_BNSC.shape[1:3]
    tensors = (query_BHTC, key_BNSC, value_BNSV)
    if T != 1 or S == 0 or H % N or query_BHTC.dtype not in DTYPES:
        return False
    if key_BNSC.shape != (B, N, S, C) or value_BNSV.shape[:3] != (B, N, S):
        return False
    if not takes_dim(C) or not takes_dim(value_BNSV.shape[-1]):
        return False
    if not alike(*tensors) or not in_vectors(*tensors):
        return False
    if mask is None:
        return True
    fits = mask.shape[0] in (1, B) and mask.shape[1:] == (1, 1, S) and mask.device == query_BHTC.device
    return fits and mask.dtype is torch.bool and mask.stride(-1) == 1


def takes_dim(dim: int) -> bool:
    return dim % _VECTOR == 0 and dim <= MAX_DIM


def attend(
    query_BH1C: Tensor, key_BNSC: Tensor, value_BNSV: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """[B, 1, H, V] on the current stream. mask: True where a key is seen; see can_attend for what it takes.

    A query that sees no key gives zeros.
    """
    B, H, _, C = query_BH1C.shape
    N, S = key_BNSC.shape[1:3]
    V, device, heads_per_kv = value_BNSV.shape[-1], query_BH1C.device, H // N
    groups = num_groups(heads_per_kv, C, V)
    num_blocks = N * -(-heads_per_kv // (8 * groups))
    splits = num_splits(S, B * num_blocks, _num_sms(device))
    y_B1HV = query_BH1C.new_empty(B, 1, H, V)
    sums = parts = None
    if splits > 1:
        sums = torch.empty(B, H, splits, V, dtype=torch.float32, device=device)
        parts = torch.empty(B, H, splits, 2, dtype=torch.float32, device=device)
    record = _ATTENTION.of(
        {
            "queries": query_BH1C.data_ptr(),
            "keys": key_BNSC.data_ptr(),
            "values": value_BNSV.data_ptr(),
            "mask": 0 if mask is None else mask.data_ptr(),
            "y": y_B1HV.data_ptr(),
            "sums": 0 if sums is None else sums.data_ptr(),
            "parts": 0 if parts is None else parts.data_ptr(),
            "query_row": query_BH1C.stride(0),
            "query_head": query_BH1C.stride(1),
            "key_row": key_BNSC.stride(0),
            "key_head": key_BNSC.stride(1),
            "key_stride": key_BNSC.stride(2),
            "value_row": value_BNSV.stride(0),
            "value_head": value_BNSV.stride(1),
            "value_stride": value_BNSV.stride(2),
            "mask_row": 0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
            "num_keys": S,
            "num_heads": H,
            "heads_per_kv": heads_per_kv,
            "scale": scale * _LOG2_E,
        }
    )
    attend_kernel, join_kernel = _functions(device, query_BH1C.dtype, C, V, groups)
    with current_stream(device):
        attend_kernel((splits, num_blocks, B), (32 * _WARPS,), (record,), shared_mem=_shared_bytes(V, groups))
        if splits > 1:
            join_kernel((H, B), (V,), (record, np.int32(splits)))
    return y_B1HV


@cache
def _num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
