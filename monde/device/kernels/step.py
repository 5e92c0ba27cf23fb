"""step.cu as calls over tensors; compiled for the current device at first use.

Letters: B sequences, T tokens, H query heads, N key-value heads, C dims of a key, V dims of a value, E experts,
K experts a token; for products D inputs and F outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from monde.device.kernels import ELEMENT_TYPES, MAX_EXPERTS, compile_options
from monde.device.kernels.launch import Kernel
from monde.device.kernels.tensors import alike, has_kernels, in_vectors, strides
from monde.device.record import Record
from monde.device.streams import current_stream

SOURCES = ("elements.cuh", "overlap.cuh", "step.cu")  # joined in this order
_KERNELS = ("rotate", "append", "choose", "normalise", "project")
MAX_TOPK = 32  # a lane of a warp keeps one
_THREADS = 256  # kThreads of elements.cuh
_TOKENS_PER_BLOCK = 4  # of choose
_WARP_DIM, _MAX_NORM_VALUES = 512, 1 << 18  # of rows that a warp normalises; more values are the library's
_PROJECT_THREADS = 128  # kProjectThreads
# Libraries read larger matrices at full speed, and of more tokens they are the quicker ones. x lies in shared memory.
_MAX_PROJECT_WEIGHTS, _MAX_PROJECT_DIM = 1 << 25, 12288
_ROTATION = Record(
    "Rotation",
    """queries keys cos sin queries_out keys_out query_row query_head query_token key_row key_head key_token
    angle_row angle_token num_rows num_tokens num_heads num_kv_heads dim""".split(),  # noqa: SIM905
    (),
)
_ADDITION = Record(
    "Addition",
    """key value keys values length ticket key_row key_head value_row value_head num_rows num_kv_heads
    num_positions key_dim value_dim""".split(),  # noqa: SIM905
    (),
)


def step_source() -> str:
    parts = (Path(__file__).with_name(name).read_text() for name in SOURCES)
    return "\n".join((_ROTATION.c_struct(), _ADDITION.c_struct(), *parts))


@cache
def _functions(dtype: torch.dtype) -> dict[str, Kernel]:
    """Errors: ImportError without CuPy."""
    import cupy

    module = cupy.RawModule(code=step_source(), options=compile_options(dtype, dtype))
    return {name: Kernel(module.get_function(name)) for name in _KERNELS}


# ---- rotate ----
def can_rotate(q_BHTC: Tensor, k_BNTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> bool:
    tensors = (q_BHTC, k_BNTC, cos_BTC, sin_BTC)
    if not alike(*tensors):
        return False
    if q_BHTC.dim() != 4 or k_BNTC.dim() != 4 or cos_BTC.dim() != 3 or cos_BTC.shape != sin_BTC.shape:
        return False
    B, _, T, C = q_BHTC.shape
    if k_BNTC.shape[0] != B or k_BNTC.shape[2:] != (T, C) or q_BHTC.numel() == 0:
        return False
    if cos_BTC.shape[0] not in (1, B) or cos_BTC.shape[1:] != (T, C) or strides(cos_BTC) != strides(sin_BTC):
        return False
    return C % (2 * (16 // q_BHTC.element_size())) == 0 and in_vectors(*tensors)


def rotate(q_BHTC: Tensor, k_BNTC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """Both turned by the angles of their positions; see can_rotate for what it takes. Results lie as [B, T, heads, C]."""
    B, H, T, C = q_BHTC.shape
    N, device = k_BNTC.shape[1], q_BHTC.device
    q_BTHC, k_BTNC = q_BHTC.new_empty(B, T, H, C), k_BNTC.new_empty(B, T, N, C)
    record = _ROTATION.of(
        {
            "queries": q_BHTC.data_ptr(),
            "keys": k_BNTC.data_ptr(),
            "cos": cos_BTC.data_ptr(),
            "sin": sin_BTC.data_ptr(),
            "queries_out": q_BTHC.data_ptr(),
            "keys_out": k_BTNC.data_ptr(),
            "query_row": q_BHTC.stride(0),
            "query_head": q_BHTC.stride(1),
            "query_token": q_BHTC.stride(2),
            "key_row": k_BNTC.stride(0),
            "key_head": k_BNTC.stride(1),
            "key_token": k_BNTC.stride(2),
            "angle_row": strides(cos_BTC)[0],
            "angle_token": strides(cos_BTC)[1],
            "num_rows": B,
            "num_tokens": T,
            "num_heads": H,
            "num_kv_heads": N,
            "dim": C,
        }
    )
    num_threads = B * T * (H + N) * C // (2 * (16 // q_BHTC.element_size()))
    with current_stream(device):
        _functions(q_BHTC.dtype)["rotate"]((-(-num_threads // _THREADS),), (_THREADS,), (record,))
    return q_BTHC.transpose(1, 2), k_BTNC.transpose(1, 2)


# ---- append ----
def can_append(key_BN1C: Tensor, value_BN1V: Tensor, keys_BNSC: Tensor, values_BNSV: Tensor) -> bool:
    tensors = (key_BN1C, value_BN1V, keys_BNSC, values_BNSV)
    if not alike(*tensors):
        return False
    if key_BN1C.shape[2] != 1 or not keys_BNSC.is_contiguous() or not values_BNSV.is_contiguous():
        return False
    pairs = ((key_BN1C, keys_BNSC), (value_BN1V, values_BNSV))
    if any(one.shape[:2] != all_.shape[:2] or one.shape[3] != all_.shape[3] for one, all_ in pairs):
        return False
    size = 16 // key_BN1C.element_size()
    return all(x.shape[-1] % size == 0 for x in tensors[:2]) and in_vectors(*tensors)


def append(
    key_BN1C: Tensor,
    value_BN1V: Tensor,
    keys_BNSC: Tensor,
    values_BNSV: Tensor,
    length: Tensor,
    ticket: Tensor,
) -> None:
    """Into the caches at `length`, int64, which grows by one; see can_append. ticket: an int32, zero, of this cache alone.

    A full cache is an error of the device, as in torch's index_copy_.
    """
    B, N, S, C = keys_BNSC.shape
    V, vector = values_BNSV.shape[-1], 16 // keys_BNSC.element_size()
    record = _ADDITION.of(
        {
            "key": key_BN1C.data_ptr(),
            "value": value_BN1V.data_ptr(),
            "keys": keys_BNSC.data_ptr(),
            "values": values_BNSV.data_ptr(),
            "length": length.data_ptr(),
            "ticket": ticket.data_ptr(),
            "key_row": key_BN1C.stride(0),
            "key_head": key_BN1C.stride(1),
            "value_row": value_BN1V.stride(0),
            "value_head": value_BN1V.stride(1),
            "num_rows": B,
            "num_kv_heads": N,
            "num_positions": S,
            "key_dim": C,
            "value_dim": V,
        }
    )
    num_threads = B * N * (C + V) // vector
    with current_stream(key_BN1C.device):
        _functions(keys_BNSC.dtype)["append"]((-(-num_threads // _THREADS),), (_THREADS,), (record,))


# ---- choose ----
def can_choose(logits_TE: Tensor, num_topk: int, score_dtype: torch.dtype) -> bool:
    T, E = logits_TE.shape
    fits = 0 < num_topk <= min(MAX_TOPK, E) and E <= MAX_EXPERTS and T > 0
    types = logits_TE.dtype in ELEMENT_TYPES and score_dtype in ELEMENT_TYPES
    return fits and types and has_kernels(logits_TE.device) and logits_TE.is_contiguous()


def choose(
    logits_TE: Tensor, num_topk: int, normalises: bool, score_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(scores_TK, ids_TK) of softmax(logits), largest first, of equal ones the lower id; see can_choose.

    normalises: the scores of a token sum to one.
    """
    T, E = logits_TE.shape
    scores_TK = torch.empty(T, num_topk, dtype=score_dtype, device=logits_TE.device)
    ids_TK = torch.empty(T, num_topk, dtype=torch.int64, device=logits_TE.device)
    with current_stream(logits_TE.device):
        _functions(logits_TE.dtype)["choose"](
            (-(-T // _TOKENS_PER_BLOCK),),
            (32 * _TOKENS_PER_BLOCK,),
            (
                logits_TE.data_ptr(),
                scores_TK.data_ptr(),
                np.int32(ELEMENT_TYPES[score_dtype]),
                ids_TK.data_ptr(),
                np.int32(T),
                np.int32(E),
                np.int32(num_topk),
                np.int32(normalises),
            ),
            shared_mem=_TOKENS_PER_BLOCK * E * 4,
        )
    return scores_TK, ids_TK


# ---- normalise ----
def can_normalise(x: Tensor, weight_D: Tensor) -> bool:
    if not alike(x, weight_D) or weight_D.numel() % (16 // x.element_size()):
        return False
    fits = 0 < x.numel() <= _MAX_NORM_VALUES and x.is_contiguous() and weight_D.is_contiguous()
    return fits and in_vectors(x.view(-1), weight_D)


def normalise(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim, in fp32, rounded once; see can_normalise."""
    D, y = weight_D.numel(), torch.empty_like(x)
    num_rows = x.numel() // D
    threads, rows = (32, _THREADS // 32) if D <= _WARP_DIM else (_THREADS, 1)
    arguments = (
        x.data_ptr(),
        weight_D.data_ptr(),
        y.data_ptr(),
        np.int64(num_rows),
        np.int32(D),
        np.float32(eps),
    )
    with current_stream(x.device):
        _functions(x.dtype)["normalise"]((-(-num_rows // rows),), (threads, rows), arguments)
    return y


# ---- project ----
def can_project(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> bool:
    tensors = (x, weight_FD) if bias_F is None else (x, weight_FD, bias_F)
    if not alike(*tensors) or x.element_size() != 2 or not all(one.is_contiguous() for one in tensors):
        return False
    D = weight_FD.shape[1]
    if x.numel() != D or weight_FD.numel() > _MAX_PROJECT_WEIGHTS or D % 8 or D > _MAX_PROJECT_DIM:
        return False
    return in_vectors(x.view(-1), weight_FD)


def project(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x weight^T + bias of one token, [..., D] -> [..., F], summed in fp32; see can_project.

    What is launched on the stream must not write weight_FD: in a captured step it is read before that has ended.
    """
    F, D = weight_FD.shape
    y = x.new_empty(*x.shape[:-1], F)
    bias = 0 if bias_F is None else bias_F.data_ptr()
    arguments = (x.data_ptr(), weight_FD.data_ptr(), bias, y.data_ptr(), np.int32(F), np.int32(D))
    num_blocks = -(-F // (_PROJECT_THREADS // 32))
    with current_stream(x.device):
        _functions(x.dtype)["project"]((num_blocks,), (_PROJECT_THREADS,), arguments, shared_mem=4 * D)
    return y
