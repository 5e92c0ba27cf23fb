"""How hot every expert is: decayed counts of the tokens it got, kept on the device of the routing ids.

L layers, E experts of a layer (layers may differ), T tokens, K experts per token, N = sum of E over layers.
Updates are tensor operations without a read back, so they may run inside a CUDA graph; `read` is the one that waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HEAT_VERSION = 1
_LAYER = "heat.{}"


class HeatTracker:
    """count <- count * 0.5 ** (1 / half_life_steps) each step, + 1 for every pair of the step.

    Pairs with weight 0 or an id outside [0, E) count for nothing. So in the long run count / `steps_in_memory` is
    the expert's tokens per step.
    """

    def __init__(
        self, num_experts_L: Sequence[int], half_life_steps: float, device: torch.device | str = "cpu"
    ) -> None:
        if not half_life_steps > 0:
            raise ValueError(f"HeatTracker: expected half_life_steps above 0, got {half_life_steps}")
        self.num_experts_L = tuple(num_experts_L)
        self.half_life_steps = float(half_life_steps)
        self.keep_per_step = 0.5 ** (1 / half_life_steps)
        self._start_L = (0, *accumulate(self.num_experts_L))
        # Two more places than experts: for what must not count, and for the decayed number of steps.
        self.state_N2 = torch.zeros(self._start_L[-1] + 2, dtype=torch.float32, device=device)
        self.count_N1, self._weight_steps = self.state_N2[:-1], self.state_N2[-1]

    def count_E(self, layer_idx: int) -> Tensor:
        """The counts of one layer, a view at a fixed address: a kernel may add to it."""
        return self.count_N1[self._start_L[layer_idx] : self._start_L[layer_idx + 1]]

    def step(self, num_steps: int = 1) -> None:
        """So many steps of the model begin: older counts weigh less. Among these steps all weigh the same."""
        self.state_N2.mul_(self.keep_per_step**num_steps)
        self._weight_steps.add_(float(num_steps))

    def update(
        self,
        layer_idx: int,
        topk_ids_TK: Tensor | NDArray[np.integer],
        topk_weights_TK: Tensor | NDArray[np.floating],
    ) -> None:
        """Count the routed pairs of one layer."""
        device = self.count_N1.device
        ids_TK = torch.as_tensor(topk_ids_TK, device=device).long()
        weights_TK = torch.as_tensor(topk_weights_TK, device=device)
        num_experts = self.num_experts_L[layer_idx]
        counts_TK = (ids_TK >= 0) & (ids_TK < num_experts) & (weights_TK != 0)
        places_TK = torch.where(counts_TK, ids_TK + self._start_L[layer_idx], self._start_L[-1])
        ones_R = torch.ones_like(places_TK, dtype=torch.float32).flatten()
        self.count_N1.scatter_add_(0, places_TK.flatten(), ones_R)

    def read(self, model: str = "") -> Heat:
        """Copy to the host; waits for the device."""
        return self.record(self.state_N2.cpu(), model)

    def record(self, state_N2: Tensor, model: str = "") -> Heat:
        """What a copy of `state_N2` on the host says."""
        values = state_N2.numpy()
        layers = tuple(values[a:b].copy() for a, b in zip(self._start_L, self._start_L[1:], strict=False))
        return Heat(model, layers, float(values[-1]))

    def load(self, heat: Heat) -> None:
        """Continue from a record. Errors: ValueError when its layers differ from the model's."""
        heat.check("this model", self.num_experts_L)
        if self._start_L[-1]:
            self.count_N1[:-1].copy_(torch.from_numpy(np.concatenate(heat.count_L)))
        self._weight_steps.fill_(heat.weight_steps)


@dataclass(frozen=True)
class Heat:
    """A heat record on the host. count_L[l] is float32 (E,); weight_steps the decayed number of steps counted."""

    model: str
    count_L: tuple[NDArray[np.float32], ...]
    weight_steps: float

    @property
    def hits_per_step_L(self) -> tuple[NDArray[np.float32], ...]:
        """Tokens per step of every expert; zero before the first step."""
        steps = self.weight_steps or 1.0
        return tuple(count_E / np.float32(steps) for count_E in self.count_L)

    @property
    def likely_count_L(self) -> tuple[NDArray[np.float32], ...]:
        """Counts as they are to be expected from now on: drawn to their layer's mean by the part that chance has in them.

        Of experts that are all equally popular the hottest look twice as hot as the rest. Pairs that arrive by chance
        spread a count by its mean at most, which they do right after a prompt, by half of it after many short steps; of
        what counts vary by, only the rest is popularity (the estimate of James and Stein, over all layers). The order of
        experts stays as it is.
        """
        layers = [count_E for count_E in self.count_L if count_E.size]
        spread = sum(float(np.square(count_E - count_E.mean()).sum()) for count_E in layers)
        chance = sum(float(count_E.sum()) for count_E in layers)
        popular = np.float32(max(0.0, 1 - chance / spread) if spread > 0 else 0.0)
        means = (count_E.sum(dtype=np.float32) / np.float32(max(1, count_E.size)) for count_E in self.count_L)
        return tuple(m + popular * (count_E - m) for count_E, m in zip(self.count_L, means, strict=True))

    def check(self, model: str, num_experts_L: Sequence[int]) -> None:
        """Errors: ValueError when the record is not of a model with these layers."""
        mine = [len(count_E) for count_E in self.count_L]
        if mine != list(num_experts_L):
            raise ValueError(
                f"heat of {self.model or 'an unnamed model'} has {len(mine)} layers of {distinct(mine)} experts, {model} "
                f"has {len(num_experts_L)} of {distinct(num_experts_L)}; record the heat of this model"
            )

    def merge(self, other: Heat) -> Heat:
        """Both together, as if all steps had been counted into one."""
        other.check(self.model or "the other record", [len(count_E) for count_E in self.count_L])
        counts = tuple(a + b for a, b in zip(self.count_L, other.count_L, strict=True))
        return Heat(self.model, counts, self.weight_steps + other.weight_steps)

    def save(self, path: str | Path) -> None:
        """A heat file: safetensors with one tensor per layer. Errors: OSError where it cannot be written."""
        tensors = {_LAYER.format(l): torch.from_numpy(count_E) for l, count_E in enumerate(self.count_L)}
        metadata = {
            "format": "monde-heat",
            "version": str(HEAT_VERSION),
            "model": self.model,
            "weight_steps": repr(self.weight_steps),
        }
        try:
            save_file(tensors, path, metadata)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"{path}: cannot be written ({error}); give a file in a folder that is there"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Heat:
        """Errors: ValueError when the file is no heat file or of another version; OSError where it cannot be read."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                names = set(file.keys())
                layers = tuple(
                    file.get_tensor(_LAYER.format(l)) for l in range(len(names)) if _LAYER.format(l) in names
                )
        except OSError as error:
            raise OSError(
                f"heat file {path}: cannot be read ({error}); model.monde.save_heat(path) writes one"
            ) from error
        except SafetensorError as error:
            raise ValueError(f"{path}: not a heat file ({error}); record one again") from error
        if metadata.get("format") != "monde-heat" or len(layers) != len(names):
            raise ValueError(f"{path}: not a heat file but other safetensors; record one again")
        if metadata.get("version") != str(HEAT_VERSION):
            raise ValueError(
                f"{path}: heat version {metadata.get('version')}, expected {HEAT_VERSION}; record one again"
            )
        return cls(metadata["model"], layers, float(metadata["weight_steps"]))


def distinct(numbers: Sequence[int]) -> str:
    """Each number once, for messages; the first four."""
    found = sorted(set(numbers))
    return " or ".join(map(str, found[:4])) if found else "no"
