"""Mixture-of-experts models larger than the GPU: hot experts on the GPU, cold ones computed on the host."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monde.config import MemoryBudget, MondeConfig
    from monde.core import Counters, LoadReport
    from monde.engine import Engine
    from monde.models.experts import UnsupportedModelError
    from monde.models.families import Family, supported_families
    from monde.models.loading import from_pretrained
    from monde.models.offload import offload
    from monde.planning.budget import BudgetError
    from monde.weights.checkpoint import CheckpointError

__version__ = "0.1.0"

# torch and transformers take seconds to import: each name brings its module in when it is first used.
_HOMES = {
    "BudgetError": "monde.planning.budget",
    "CheckpointError": "monde.weights.checkpoint",
    "Counters": "monde.core",
    "Engine": "monde.engine",
    "Family": "monde.models.families",
    "LoadReport": "monde.core",
    "MemoryBudget": "monde.config",
    "MondeConfig": "monde.models.quantizer",
    "UnsupportedModelError": "monde.models.experts",
    "from_pretrained": "monde.models.loading",
    "offload": "monde.models.offload",
    "supported_families": "monde.models.families",
}

__all__ = [
    "BudgetError",
    "CheckpointError",
    "Counters",
    "Engine",
    "Family",
    "LoadReport",
    "MemoryBudget",
    "MondeConfig",
    "UnsupportedModelError",
    "__version__",
    "from_pretrained",
    "offload",
    "supported_families",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'monde' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
