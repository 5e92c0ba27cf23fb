"""What changes around the experts of a model that runs on the CPU alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from monde.models.cpu_attention import speed_up_attention
from monde.models.dense import speed_up_dense
from monde.models.host_threads import give_cores_to_decode


def speed_up_on_cpu(model: nn.Module, device: torch.device, pool: Any) -> None:
    """Dense layers, attention and threads; nothing where the model's device is a GPU. pool: the experts' threads."""
    if device.type == "cpu":
        speed_up_dense(model, pool)
        speed_up_attention(model)
        give_cores_to_decode(model)
