"""Dense bf16 layers of a few tokens on the host, from row-major weights where they lie.

Letters: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any, NoReturn

from hostcompute.arrays import as_host_array
from hostcompute.pool import shared_pool


class DenseKernel:
    """x_TK weights_NK^T + bias_N, accumulated in fp32 and rounded once; native backend only.

    pool: from `make_pool` (default: the process's own). Errors: ImportError without the native module,
    RuntimeError when MONDE_CPU_ISA names an ISA that is absent here.
    """

    def __init__(self, pool: Any = None) -> None:
        from hostcompute import _native
        from hostcompute.backends.native import choose_isa

        self._native: Any = _native
        self._pool = pool
        self.isa, _ = choose_isa(None)
        self.max_tokens = int(_native.MAX_DENSE_TOKENS)

    def __call__(self, x_TK: Any, weights_NK: Any, bias_N: Any, out_TN: Any) -> None:
        """All arrays bf16 with rows of unit stride; T at most max_tokens; bias_N may be None.

        Errors: ValueError for shapes, types and strides.
        """
        x, weights, out = (
            as_host_array(value, f"[dense] {name}")
            for name, value in (("x", x_TK), ("weights", weights_NK), ("out", out_TN))
        )
        bias = None if bias_N is None else as_host_array(bias_N, "[dense] bias")
        (num_tokens, num_inputs), num_outputs = x.shape, weights.shape[0]
        wanted = {
            "weights": (num_outputs, num_inputs),
            "out": (num_tokens, num_outputs),
            "bias": (num_outputs,),
        }
        for name, array in (("x", x), ("weights", weights), ("out", out), ("bias", bias)):
            if array is None:
                continue
            if array.dtype != "bf16" or not array.has_unit_stride_rows:
                raise ValueError(
                    f"[dense] {name}: expected bf16 with rows of unit stride, got {array.dtype} with strides "
                    f"{array.strides}"
                )
            if array.shape != wanted.get(name, array.shape):
                raise ValueError(f"[dense] {name}: expected shape {wanted[name]}, got {array.shape}")
        self._native.dense(
            self._pool or shared_pool(),
            self.isa,
            x.address,
            x.strides[0],
            weights.address,
            weights.strides[0],
            0 if bias is None else bias.address,
            out.address,
            out.strides[0],
            num_tokens,
            num_inputs,
            num_outputs,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseKernel:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model run by monde cannot be pickled; use save_pretrained and load it again")
