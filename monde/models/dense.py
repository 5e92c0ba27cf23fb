"""Dense bf16 linear layers on the CPU, where torch's product is far from the machine.

Few rows, decode: hostcompute's own kernel reads the model's weights where they lie, on the experts' threads.
torch's threads would spin beside those after every product and take their cores.
Many rows on CPUs without bf16 instructions: computed in fp32, block by block so that the widened weights stay in
cache. Measured on an Ice Lake core (AVX-512 without BF16), D=2048 x F=4096, 512 rows, torch 2.13: F.linear 25
GFLOP/s in bf16, 85 when both operands are widened to fp32 first. Rejected: fp32 copies (twice the memory).
Both accumulate in fp32 and round once, as F.linear does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostcompute.dense import DenseKernel

# Widening costs reading 2 and writing 4 bytes a weight, about as much as 20 rows of the slow product.
MIN_WIDENED_ROWS = 24
BLOCK_WEIGHTS = 1 << 20  # 4 MiB widened
MIN_KERNEL_WEIGHTS = 1 << 16  # below, waking the threads takes longer than the product


class HostLinear(nn.Linear):
    """nn.Linear with the same parameters and result, up to the order of fp32 additions."""

    _kernel: DenseKernel | None = None
    _widens = False

    def forward(self, x: Tensor) -> Tensor:
        # Autograd would keep every widened block; inside a compiled graph torch's product is one node.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype != torch.bfloat16:
            return F.linear(x, self.weight, self.bias)
        num_rows = x.numel() // self.in_features
        x_TK = x.reshape(num_rows, self.in_features)
        if (
            self._kernel is not None
            and 0 < num_rows <= self._kernel.max_tokens
            and self.weight.numel() >= MIN_KERNEL_WEIGHTS
        ):
            y_TN = x.new_empty(num_rows, self.out_features)
            self._kernel(x_TK.contiguous(), self.weight, self.bias, y_TN)
        elif self._widens and num_rows >= MIN_WIDENED_ROWS:
            y_TN = self._widened(x_TK.float())
        else:
            return F.linear(x, self.weight, self.bias)
        return y_TN.view(*x.shape[:-1], self.out_features)

    def _widened(self, x_TK: Tensor) -> Tensor:
        y_TN = x_TK.new_empty(x_TK.shape[0], self.out_features, dtype=torch.bfloat16)
        num_rows = max(1, BLOCK_WEIGHTS // self.in_features)
        for begin in range(0, self.out_features, num_rows):
            block = slice(begin, begin + num_rows)
            bias = None if self.bias is None else self.bias[block].float()
            y_TN[:, block] = F.linear(x_TK, self.weight[block].float(), bias)
        return y_TN


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has AVX-512-BF16, which AMX-BF16 implies."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def speed_up_dense(model: nn.Module, pool: Any = None) -> None:
    """Let every bf16 nn.Linear compute as above; subclasses keep their own way.

    pool: the threads of the experts, None for the process's own.
    """
    try:
        kernel = DenseKernel(pool)
    except ImportError:  # experts run on numba then, which `engine.host_choice` says
        kernel = None
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = HostLinear
            module._kernel, module._widens = kernel, not cpu_multiplies_bf16()  # type: ignore[assignment]
