"""Resident experts of one layer: a slot holds one expert's blob, as host memory holds it (hostcompute.layout).

Letters: S slots, B bytes of a blob, D model dim, F expert hidden dim; D16 and F16 are padded to 16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hostcompute import ExpertSpec, make_layout
from hostcompute.layout import LANES
from monde.weights.packing import pack, unpack


def slot_bytes(spec: ExpertSpec) -> int:
    """Device memory of one slot: the blob and, where the spec has biases, their padded fp32 values."""
    return make_layout(spec).weight_bytes + 4 * sum(bias_sizes(spec).values())


class ExpertSlots:
    """blobs_SB, and biases as fp32: gate_bias [S, F16], up_bias [S, F16], down_bias [S, D16]."""

    def __init__(self, spec: ExpertSpec, num_slots: int, device: torch.device) -> None:
        self.spec, self.num_slots = spec, num_slots
        self.blobs_SB = torch.zeros(
            num_slots, make_layout(spec).weight_bytes, dtype=torch.uint8, device=device
        )
        self.biases = {
            role: torch.zeros(num_slots, size, device=device) for role, size in bias_sizes(spec).items()
        }

    def write(self, slot: int, weights: Mapping[str, Tensor]) -> None:
        """Pack one expert's arrays (keywords of ExpertBank.load) into `slot`; biases left out are zero."""
        pack(self.spec, weights, self.blobs_SB[slot])
        for role, bias_SN in self.biases.items():
            bias_SN[slot].zero_()
            if role in weights:
                bias_SN[slot, : weights[role].shape[0]].copy_(weights[role])

    def read(self, slot: int) -> dict[str, Tensor]:
        """One expert's arrays, row-major, biases in fp32; copies on the device."""
        sizes = {"gate_bias": self.spec.d_ffn, "up_bias": self.spec.d_ffn, "down_bias": self.spec.d_model}
        biases = {role: bias_SN[slot, : sizes[role]].clone() for role, bias_SN in self.biases.items()}
        return unpack(self.spec, self.blobs_SB[slot]) | biases

    @property
    def num_bytes(self) -> int:
        return self.blobs_SB.nbytes + sum(bias.nbytes for bias in self.biases.values())


def bias_sizes(spec: ExpertSpec) -> dict[str, int]:
    if not spec.has_bias:
        return {}
    layout = make_layout(spec)
    f16, d16 = layout.num_f_panels * LANES, layout.num_d_panels * LANES
    return ({"gate_bias": f16} if spec.gated else {}) | {"up_bias": f16, "down_bias": d16}
