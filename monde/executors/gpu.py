"""Resident experts, computed where they live: plain torch, one group of tokens per expert.

Works on any torch device, so that tests use the CPU as a stand-in for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from monde.core import RoutedBatch
from monde.executors.activations import activate
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable


@dataclass(frozen=True)
class Launched:
    """A result whose kernels were launched on the current stream."""

    y_TD: Tensor

    def wait(self) -> Tensor:
        return self.y_TD


class GpuExecutor:
    """Computes pairs of one layer whose expert has a slot; ignores all others."""

    def __init__(self, slots: ExpertSlots, table: SlotTable) -> None:
        self.slots, self.table = slots, table
        self.num_pairs = 0

    def submit(self, batch: RoutedBatch, out_dtype: torch.dtype) -> Launched:
        x_TD, num_topk = batch.x_TD, batch.topk_ids_TK.shape[1]
        num_slots = self.slots.num_slots
        slots_R = slot_of(self.table.slot_of_expert_E1, batch.topk_ids_TK).flatten()
        weights_R = batch.topk_weights_TK.flatten().float()
        slots_R = torch.where(weights_R != 0, slots_R, -1)
        slots_R, order_R = torch.sort(slots_R)
        counts = torch.bincount(slots_R + 1, minlength=num_slots + 1).tolist()
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        start = counts[0]
        self.num_pairs += len(slots_R) - start
        for slot, count in enumerate(counts[1:]):
            if count:
                pairs = order_R[start : start + count]
                tokens = pairs // num_topk
                y = self._expert(slot, x_TD[tokens])
                y_TD.index_add_(0, tokens, y.float() * weights_R[pairs, None])
                start += count
        return Launched(y_TD.to(out_dtype))

    def _expert(self, slot: int, x_TD: Tensor) -> Tensor:
        w = self.slots.read(slot)
        dtype = torch.promote_types(x_TD.dtype, w["up"].dtype)
        w = {role: tensor.to(dtype) for role, tensor in w.items()}
        x_TD = x_TD.to(dtype)
        up_TF = F.linear(x_TD, w["up"], w.get("up_bias")).float()
        if self.slots.spec.gated:
            gate_TF = F.linear(x_TD, w["gate"], w.get("gate_bias")).float()
            h_TF = activate(self.slots.spec.activation, gate_TF, up_TF)
        else:
            h_TF = activate(self.slots.spec.activation, up_TF, None)
        return F.linear(h_TF.to(dtype), w["down"], w.get("down_bias"))


def slot_of(slot_of_expert_E1: Tensor, topk_ids_TK: Tensor) -> Tensor:
    """The slot of every pair's expert, -1 where it has none or the id is out of range."""
    num_experts = slot_of_expert_E1.shape[0] - 1
    in_range_TK = (topk_ids_TK >= 0) & (topk_ids_TK < num_experts)
    return slot_of_expert_E1[torch.where(in_range_TK, topk_ids_TK, num_experts)]
