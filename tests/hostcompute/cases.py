"""Random experts and batches in every form that a caller may hand over. Letters as in hostcompute.spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hostcompute import ExpertBank, ExpertSpec
from hostcompute.arrays import HostArray, bf16_bits
from tests.hostcompute.bounds import F64, Expected, forward_bound

LAYOUTS = ("separate", "concatenated", "interleaved", "transposed", "padded")


def host_array(values: npt.NDArray[Any], dtype: str) -> HostArray:
    """`values` rounded to `dtype`, in memory of their own."""
    if dtype == "bf16":
        return as_view(bf16_bits(values), "bf16")
    array = np.ascontiguousarray(values, dtype={"f32": np.float32, "f16": np.float16}[dtype])
    return as_view(array, dtype)


def as_view(array: npt.NDArray[Any], dtype: str) -> HostArray:
    strides = tuple(s // array.itemsize for s in array.strides)
    return HostArray(array.ctypes.data, array.shape, strides, dtype, array)


def sliced(array: HostArray, index: Any) -> HostArray:
    """NumPy indexing of a HostArray, without a copy."""
    return as_view(array.numpy()[index], array.dtype)


def make_expert(rng: np.random.Generator, spec: ExpertSpec, layout: str) -> dict[str, HostArray]:
    """Keyword arguments for ExpertBank.load, laid out as checkpoints of the families do."""
    D, F, dtype = spec.d_model, spec.d_ffn, spec.dtype.value

    def matrix(rows: int, columns: int) -> HostArray:
        return host_array(rng.standard_normal((rows, columns)) / np.sqrt(columns), dtype)

    names = ["gate", "up"] if spec.gated else ["up"]
    expert: dict[str, HostArray] = {}
    if layout == "concatenated":
        both = matrix(len(names) * F, D)
        expert = {name: sliced(both, slice(i * F, (i + 1) * F)) for i, name in enumerate(names)}
        expert["down"] = matrix(D, F)
    elif layout == "interleaved":
        both = matrix(len(names) * F, D)
        expert = {name: sliced(both, slice(i, None, len(names))) for i, name in enumerate(names)}
        expert["down"] = matrix(D, F)
    elif layout == "transposed":
        expert = {name: as_view(matrix(D, F).numpy().T, dtype) for name in names}
        expert["down"] = as_view(matrix(F, D).numpy().T, dtype)
    elif layout == "padded":
        expert = {name: sliced(matrix(F, D + 3), np.s_[:, 1 : D + 1]) for name in names}
        expert["down"] = sliced(matrix(D, F + 5), np.s_[:, 2 : F + 2])
    else:
        expert = {name: matrix(F, D) for name in names} | {"down": matrix(D, F)}
    if spec.has_bias:
        for name in (*names, "down"):
            if rng.random() < 0.8:
                expert[f"{name}_bias"] = host_array(rng.standard_normal(D if name == "down" else F), dtype)
    return expert


@dataclass(frozen=True)
class Batch:
    x_TD: HostArray
    ids_TK: npt.NDArray[Any]
    weights_TK: HostArray

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        return self.x_TD, self.ids_TK, self.weights_TK


def make_batch(
    rng: np.random.Generator,
    spec: ExpertSpec,
    num_tokens: int,
    top_k: int,
    x_dtype: str = "f32",
    weights_dtype: str = "f32",
    ids_dtype: str = "int64",
) -> Batch:
    """Ids from -2 to E + 1: some are out of range, some repeat in a row; a fifth of the weights are 0."""
    x_TD = host_array(rng.standard_normal((num_tokens, spec.d_model)), x_dtype)
    ids_TK = rng.integers(-2, spec.num_experts + 2, (num_tokens, top_k)).astype(ids_dtype)
    weights_TK = rng.random((num_tokens, top_k)) * (rng.random((num_tokens, top_k)) > 0.2)
    return Batch(x_TD, ids_TK, host_array(weights_TK, weights_dtype))


def expected(
    spec: ExpertSpec, experts: dict[int, dict[str, HostArray]], batch: Batch, out_dtype: str, bf16_dots: bool
) -> Expected:
    """The oracle's answer and the derived bound around it."""
    stored: dict[int, dict[str, F64]] = {
        e: {name: array.float32().astype(np.float64) for name, array in expert.items()}
        for e, expert in experts.items()
    }
    return forward_bound(
        spec,
        stored,
        batch.x_TD.float32().astype(np.float64),
        batch.ids_TK.astype(np.int64),
        batch.weights_TK.float32().astype(np.float64),
        out_dtype,
        bf16_dots,
    )


def load_all(bank: ExpertBank, experts: dict[int, dict[str, HostArray]]) -> ExpertBank:
    for expert_id, expert in experts.items():
        bank.load(expert_id, **expert)
    return bank


def forward(bank: ExpertBank, batch: Batch, out_dtype: str = "f32") -> npt.NDArray[np.float32]:
    """bank.forward into an array of `out_dtype`, read back as float32."""
    out = host_array(np.full(batch.x_TD.shape, np.nan), out_dtype)
    bank.forward(*batch.arguments, out=out)
    return out.float32()
