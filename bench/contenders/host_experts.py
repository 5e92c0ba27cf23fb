"""Experts of some layers in pinned host memory, slots on the device, and copies between them on a stream of their own.

Row-major as checkpoints hold them: what offloaders built on torch use. Letters: L layers, E experts, S slots,
T tokens, K top-k, D model dim, F expert hidden dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.decode import models
from bench.decode.shapes import DTYPE


@dataclass(frozen=True)
class HostLayer:
    """N is 2 F where gate and up lie together, as transformers keeps them, and F where there is no gate."""

    gate_up_ENK: Tensor
    down_EDF: Tensor

    @property
    def expert_bytes(self) -> int:
        return self.gate_up_ENK[0].nbytes + self.down_EDF[0].nbytes


class HostExperts:
    """layers[l] in pinned memory; pageable where there is no GPU to copy to."""

    def __init__(self, model: Any, num_layers: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.device, self.layers = device, []
        for layer_idx, (_, experts) in enumerate(models.moe_blocks(model)[:num_layers]):
            source = models.windowed(experts, layer_idx)
            tensors = []
            for name in ("gate_up_proj", "down_proj"):
                windows = source.get_parameter(name).detach()
                tensors.append(torch.empty(windows.shape, dtype=DTYPE, pin_memory=pinned).copy_(windows))
            self.layers.append(HostLayer(*tensors))


def expert(x_TD: Tensor, in_ND: Tensor, down_DF: Tensor) -> Tensor:
    """One expert: gate and up together with SiLU, or, where there is one input matrix, ReLU."""
    h_TN = F.linear(x_TD, in_ND)
    if h_TN.shape[1] == down_DF.shape[1]:
        return F.linear(F.relu(h_TN), down_DF)
    gate_TF, up_TF = h_TN.chunk(2, dim=-1)
    return F.linear(F.silu(gate_TF) * up_TF, down_DF)


def weight_of(ids_TK: Tensor, weights_TK: Tensor, expert_id: int) -> Tensor:
    """Every token's weight for this expert, [T, 1]; 0 where it did not choose it. On the device, nobody waits."""
    return (weights_TK * (ids_TK == expert_id)).sum(1, keepdim=True)


class Slots:
    """Experts of one layer on the device. A slot's new weights come on `stream`, after its last use."""

    def __init__(self, layer: HostLayer, num_slots: int, device: torch.device, stream: Any) -> None:
        self._layer, self._stream, self.num_slots = layer, stream, num_slots
        shape = {"dtype": DTYPE, "device": device}
        self.gate_up_SNK = torch.empty(num_slots, *layer.gate_up_ENK.shape[1:], **shape)
        self.down_SDF = torch.empty(num_slots, *layer.down_EDF.shape[1:], **shape)
        self._used: list[Any] = [None] * num_slots
        self._arrived: list[Any] = [None] * num_slots

    def fetch(self, slot: int, expert_id: int) -> None:
        pairs = (
            (self.gate_up_SNK[slot], self._layer.gate_up_ENK[expert_id]),
            (self.down_SDF[slot], self._layer.down_EDF[expert_id]),
        )
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return
        if self._used[slot] is not None:
            self._stream.wait_event(self._used[slot])
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            self._arrived[slot] = self._stream.record_event()

    def compute(self, slot: int, x_TD: Tensor) -> Tensor:
        if self._arrived[slot] is not None:
            torch.cuda.current_stream().wait_event(self._arrived[slot])
            self._arrived[slot] = None
        y_TD = expert(x_TD, self.gate_up_SNK[slot], self.down_SDF[slot])
        if self._stream is not None:
            self._used[slot] = torch.cuda.current_stream().record_event()
        return y_TD


def copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def replaced(model: Any, modules: list[nn.Module]) -> None:
    """Put modules where the experts are."""
    for (block, _), module in zip(models.moe_blocks(model), modules, strict=True):
        block.experts = module
