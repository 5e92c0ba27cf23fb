"""A real transformers model with random weights, made in seconds: dense weights once, experts as each contender wants.

Every contender gets a model of its own class structure, and all share the same dense tensors.

Routing is decided by transformers' own router from its own weight. Dimension 0 of the residual stream is the same
large number for every token, so column 0 of a router's weight is a bias per expert (bench.decode.skew sets it) and
the other columns are noise that differs from token to token.

Letters: L layers, E experts, D model dim, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from bench.decode.shapes import DTYPE

# What layers add to the residual stream must stay small next to the embedding, or the bias of late layers fades.
BRANCH_SCALE = 0.1
NUM_DISTINCT_LAYERS = 2  # of random bytes on the host; drawing more takes seconds and tells nothing
_BRANCH_ENDS = ("o_proj", "down_proj")

MakeExperts = Callable[[nn.Module, int], nn.Module]


def make_dense(config: PretrainedConfig, device: torch.device) -> dict[str, Tensor]:
    """All parameters but the experts', by name."""
    generator = torch.Generator(device).manual_seed(0)
    dense = {}
    for name, param in _on_meta(config).named_parameters():
        if ".experts." in name:
            continue
        tensor = torch.empty(param.shape, dtype=DTYPE, device=device)
        if param.dim() == 1:
            tensor.fill_(1)
        elif name.endswith("embed_tokens.weight"):
            tensor.normal_(generator=generator)
            tensor[:, 0] = param.shape[1] ** 0.5
        else:
            scale = BRANCH_SCALE if any(end in name for end in _BRANCH_ENDS) else 1.0
            tensor.normal_(std=scale * param.shape[1] ** -0.5, generator=generator)
        dense[name] = tensor
    return dense


def build(
    config: PretrainedConfig, dense: dict[str, Tensor], device: torch.device, make_experts: MakeExperts
) -> Any:
    """The model with these dense tensors; make_experts(module, layer_idx) gives what stands where the experts were."""
    model = _on_meta(config)
    for name, tensor in dense.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path) if _has(model, path) else None
        if owner is not None:  # a model of fewer layers takes the first ones
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    for layer_idx, (block, experts) in enumerate(moe_blocks(model)):
        block.experts = make_experts(experts, layer_idx)
    rotary = model.model.rotary_emb
    with device:
        model.model.rotary_emb = type(rotary)(config=config)
    return model.eval()


def moe_blocks(model: Any) -> list[tuple[Any, nn.Module]]:
    """(block that owns gate and experts, its experts) of every layer."""
    return [(layer.mlp, layer.mlp.experts) for layer in model.model.layers]


def windowed(experts: nn.Module, layer_idx: int) -> nn.Module:
    """Parameters whose experts are overlapping windows of one small buffer: all differ, and none takes memory.

    What is loaded from them (banks, slots) has memory of its own for every expert.
    """
    for name, param in list(experts.named_parameters(recurse=False)):
        E, rows, columns = param.shape
        buffer = _buffer(name, rows + E, columns, layer_idx % NUM_DISTINCT_LAYERS)
        windows_ENK = buffer.as_strided((E, rows, columns), (columns, columns, 1))
        setattr(experts, name, nn.Parameter(windows_ENK, requires_grad=False))
    return experts


def in_host_memory(experts: nn.Module, layer_idx: int) -> nn.Module:
    """Every expert with memory of its own on the host, pageable, as from_pretrained leaves it."""
    for name, param in list(windowed(experts, layer_idx).named_parameters(recurse=False)):
        setattr(experts, name, nn.Parameter(param.detach().clone().contiguous(), requires_grad=False))
    return experts


@cache
def _buffer(name: str, num_rows: int, num_columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = BRANCH_SCALE if name == "down_proj" else 1.0
    return torch.randn(num_rows, num_columns, generator=generator).mul_(scale * num_columns**-0.5).to(DTYPE)


def on_device(device: torch.device) -> MakeExperts:
    """Every expert with memory of its own on the device, as transformers has them."""

    def make(experts: nn.Module, layer_idx: int) -> nn.Module:
        for name, param in list(experts.named_parameters(recurse=False)):
            scale = BRANCH_SCALE if name == "down_proj" else 1.0
            values = torch.empty(param.shape, dtype=DTYPE, device=device)
            values.normal_(std=scale * param.shape[2] ** -0.5)
            setattr(experts, name, nn.Parameter(values, requires_grad=False))
        return experts

    return make


class Nothing(nn.Module):
    """Where experts were: their input is their output, and not even a kernel runs."""

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        return x_TD


def nothing(experts: nn.Module, layer_idx: int) -> nn.Module:
    return Nothing()


def _on_meta(config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
