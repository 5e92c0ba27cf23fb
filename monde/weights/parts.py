"""The part of a layer's experts that one rank holds: a slice along F of every expert, or some experts whole.

D model dim, F expert hidden dim. A slice of an expert is an expert with a smaller F: rows of gate and up, columns of
down. Its output is a part of the sum, to which one rank alone adds the bias of the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hostcompute import ExpertSpec


class Part(Protocol):
    """What of a layer this rank holds. `spec` describes that, with its own expert ids."""

    @property
    def spec(self) -> ExpertSpec: ...

    def local_id(self, expert_id: int) -> int | None:
        """The expert's id here; None where this rank holds nothing of it."""

    def take(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is held of one expert's arrays (keywords of ExpertBank.load); views."""

    def join(self, parts_W: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One expert again, from what every rank holds of it; the inverse of `take`."""


@dataclass(frozen=True)
class FfnSlice:
    """Rows start to end of F of every expert of `whole`."""

    whole: ExpertSpec
    start: int
    end: int

    @property
    def spec(self) -> ExpertSpec:
        return replace(self.whole, d_ffn=self.end - self.start)

    def local_id(self, expert_id: int) -> int | None:
        return expert_id

    def take(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        part = {}
        for role, array in arrays.items():
            if role == "down":
                part[role] = array[:, self.start : self.end]
            elif role == "down_bias":
                part[role] = array if self.start == 0 else torch.zeros_like(array)
            else:
                part[role] = array[self.start : self.end]
        return part

    def join(self, parts_W: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        whole = {
            role: torch.cat([p[role] for p in parts_W]) for role in parts_W[0] if not role.startswith("down")
        }
        whole["down"] = torch.cat([part["down"] for part in parts_W], dim=1)
        if "down_bias" in parts_W[0]:
            whole["down_bias"] = parts_W[0]["down_bias"]
        return whole


@dataclass(frozen=True)
class SomeExperts:
    """Experts first to end of `whole`, unchanged. A rank without any keeps room for one, which is never called."""

    whole: ExpertSpec
    first: int
    end: int

    @property
    def spec(self) -> ExpertSpec:
        return replace(self.whole, num_experts=max(1, self.end - self.first))

    def local_id(self, expert_id: int) -> int | None:
        return expert_id - self.first if self.first <= expert_id < self.end else None

    def take(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(arrays)

    def join(self, parts_W: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return dict(next(part for part in parts_W if part))
