"""What changes around the experts of a model that runs on a GPU: launches that take longer than their work."""

from __future__ import annotations

import torch
from torch import nn

from monde.models.gpu_attention import speed_up_decode_attention
from monde.models.gpu_dense import speed_up_dense_steps
from monde.models.rotary import fuse_rotary
from monde.models.routers import fuse_routers


def speed_up_on_gpu(model: nn.Module, device: torch.device) -> None:
    """Attention and dense layers of decode steps, rotary embeddings, routers; nothing where the device is no GPU."""
    if device.type == "cuda":
        speed_up_decode_attention(model, device)
        speed_up_dense_steps(model)
        fuse_rotary(model)
        fuse_routers(model)
