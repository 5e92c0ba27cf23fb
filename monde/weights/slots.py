"""Resident experts of one layer: row-major tensors in device memory, one slot per expert."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hostcompute import DType, ExpertSpec

TORCH_DTYPES = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16}


class ExpertSlots:
    """gate_SFD, up_SFD, down_SDF and, where the spec has biases, gate_bias_SF, up_bias_SF, down_bias_SD."""

    def __init__(self, spec: ExpertSpec, num_slots: int, device: torch.device) -> None:
        S, D, F = num_slots, spec.d_model, spec.d_ffn
        self.spec = spec
        shapes: dict[str, tuple[int, ...]] = {"up": (S, F, D), "down": (S, D, F)}
        if spec.gated:
            shapes["gate"] = (S, F, D)
        if spec.has_bias:
            shapes |= {"up_bias": (S, F), "down_bias": (S, D)}
            if spec.gated:
                shapes["gate_bias"] = (S, F)
        dtype = TORCH_DTYPES[spec.dtype]
        self.tensors = {
            role: torch.zeros(shape, dtype=dtype, device=device) for role, shape in shapes.items()
        }

    def write(self, slot: int, weights: Mapping[str, Tensor]) -> None:
        """Copy one expert's arrays (keywords of ExpertBank.load) into `slot`; biases left out are zero."""
        for role, tensor in self.tensors.items():
            if role in weights:
                tensor[slot].copy_(weights[role])
            else:
                tensor[slot].zero_()

    def read(self, slot: int) -> dict[str, Tensor]:
        """Views of one expert's arrays on the device."""
        return {role: tensor[slot] for role, tensor in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())
