"""What all contenders get and what they answer.

L layers, E experts.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from bench.decode import models
from bench.decode.bound import Traffic
from bench.decode.shapes import Shape
from bench.decode.steps import Case, Decoding, Steps


class DoesNotFitError(RuntimeError):
    """The case cannot run; the message says why, and stands in the artefact."""


@dataclass(frozen=True)
class Setting:
    """One model on one machine; dense tensors are shared by everybody."""

    config: PretrainedConfig
    shape: Shape
    dense: dict[str, Tensor]
    device: torch.device

    @cached_property
    def outline(self) -> Any:
        """The model with experts that have shapes and no memory."""
        return models.build(self.config, self.dense, self.device, lambda experts, layer_idx: experts)


@dataclass(frozen=True)
class Demand:
    """What comes next: the case, and how often a token chooses each expert (p_LE), for those who want to know."""

    case: Case
    skew: str
    p_LE: NDArray[np.float64] = field(repr=False)


class Contender(Protocol):
    """name, group and budget are those of bench.decode.bound.Row; num_layers those that run, from the first one up."""

    name: str
    group: str
    budget: str
    num_layers: int
    note: str

    def decoding(self, demand: Demand) -> Decoding:
        """Warm, at its steady state for the demand, and its counters at zero. Errors: DoesNotFitError."""
        ...

    def traffic(self, demand: Demand, num_steps: int) -> Traffic:
        """Distinct experts that a step of its layers read since `decoding`."""
        ...

    def figures(self, num_steps: int) -> dict[str, Any]:
        """Whatever else is worth keeping."""
        ...

    def close(self) -> None: ...


def decoding_of(steps: Steps, model: Any, case: Case) -> Decoding:
    return Decoding(steps, model.config.vocab_size, case.batch, model.device)


def shortened(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same model with its first layers only."""
    values = config.to_dict()
    values.pop("layer_types", None)
    return type(config).from_dict(values | {"num_hidden_layers": num_layers})


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()


def peak_gpu_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
