"""Builds the zoo: a tiny random model for every mixture-of-experts family that transformers ships.

`decorated_families` reads the installed transformers, so that a new release shows what `animals` lacks.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.models.animals import ANIMALS, NUM_TOKENS, TINY, Animal

EVERY_ANIMAL = [
    pytest.param(
        animal,
        id=animal.family,
        marks=pytest.mark.skipif(not animal.is_available, reason=f"came with transformers {animal.since}"),
    )
    for animal in ANIMALS
]
DECORATED = re.compile(r"^@use_experts_implementation", re.MULTILINE)


def decorated_families() -> set[str]:
    """Folders of the installed transformers with a model file on the experts interface."""
    models = Path(transformers.__file__).parent / "models"
    return {path.parent.name for path in models.glob("*/modeling_*.py") if DECORATED.search(path.read_text())}


def example_inputs(animal: Animal, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two sequences of random tokens (special ones left out) as keyword arguments of the model's forward."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 90, (2, NUM_TOKENS), generator=generator)
    if animal.kind in ("encoder_decoder", "block_diffusion"):
        return dict(input_ids=input_ids, decoder_input_ids=input_ids.flip(0))
    return dict(input_ids=input_ids)


def tiny_config(config_class: type, overrides: dict[str, Any]) -> Any:
    """`config_class` with TINY where it has such a field, sub-configs likewise, and `overrides` on top."""
    fields = {name for cls in config_class.__mro__ for name in getattr(cls, "__annotations__", {})}
    values = {name: value for name, value in TINY.items() if name in fields} | overrides
    for name, sub_class in (getattr(config_class, "sub_configs", None) or {}).items():
        if hasattr(sub_class, "model_type"):
            values[name] = tiny_config(sub_class, overrides.get(name, {}))
    return config_class(**values)


def build(animal: Animal, seed: int = 0) -> Any:
    """The model in fp32, eval mode and with eager experts; every parameter is random, outputs are O(1)."""
    module = importlib.import_module(f"transformers.models.{animal.family}.modeling_{animal.family}")
    model_class = getattr(module, animal.model)
    torch.manual_seed(seed)
    model = model_class(tiny_config(model_class.config_class, animal.config)).float().eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Matrices get variance 1/fan_in; vectors (norms, biases, decays) move off their initial values."""
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            fan_in = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel()
            parameter.normal_(std=fan_in**-0.5)
    for name, buffer in model.named_buffers():
        if "bias" in name and buffer.is_floating_point():
            buffer.add_(0.1 * torch.randn_like(buffer))
        if name.endswith("tid2eid"):  # a hash router's table: token id -> expert ids
            buffer.random_(TINY["n_routed_experts"])
