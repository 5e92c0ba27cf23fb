"""Dense linear layers on CPUs without bf16 instructions, where torch's bf16 product is far from the machine.

Measured on an Ice Lake core (AVX-512 without BF16), D=2048 x F=4096, torch 2.13:
    one row     F.linear 6.1 GB/s of weights, torch.mv 9.5, plain reading 10.7
    512 rows    F.linear 25 GFLOP/s in bf16, 85 when both operands are widened to fp32 first
So one row goes through `mv`, and many rows are computed in fp32, block by block so that the widened weights stay
in cache. Both accumulate in fp32 and round once, as F.linear does. Rejected: fp32 copies (twice the memory), and
own kernels (the experts' layout would need a second packing of weights that the model still owns).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Widening costs reading 2 and writing 4 bytes a weight, about as much as 20 rows of the slow product.
MIN_WIDENED_ROWS = 24
BLOCK_WEIGHTS = 1 << 20  # 4 MiB widened


class HostLinear(nn.Linear):
    """nn.Linear with the same parameters and result, up to the order of fp32 additions."""

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        if x_TD.shape[0] == 1 and not torch.is_grad_enabled():
            w_FD, x_D = self.weight, x_TD[0]
            y_F = torch.mv(w_FD, x_D) if self.bias is None else torch.addmv(self.bias, w_FD, x_D)
            return y_F.view(*x.shape[:-1], -1)
        if (
            x_TD.shape[0] < MIN_WIDENED_ROWS or torch.is_grad_enabled()
        ):  # autograd would keep every widened block
            return F.linear(x, self.weight, self.bias)
        y_TF = x.new_empty(x_TD.shape[0], self.out_features)
        x_TD = x_TD.float()
        num_rows = max(1, BLOCK_WEIGHTS // self.in_features)
        for begin in range(0, self.out_features, num_rows):
            block = slice(begin, begin + num_rows)
            bias = None if self.bias is None else self.bias[block].float()
            y_TF[:, block] = F.linear(x_TD, self.weight[block].float(), bias)
        return y_TF.view(*x.shape[:-1], -1)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has AVX-512-BF16, which AMX-BF16 implies."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def speed_up_dense(model: nn.Module, device: torch.device) -> None:
    """Let every bf16 nn.Linear of a model on the CPU compute as above; subclasses keep their own way."""
    if device.type != "cpu" or cpu_multiplies_bf16():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = HostLinear
