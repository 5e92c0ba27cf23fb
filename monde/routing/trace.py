"""What a model's routers asked for, step by step: recorded once, replayed offline against any policy.

T tokens of the step, K experts per token, L layers, E experts of a layer.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from monde.core import NOT_MINE, Placement
from monde.routing.heat import distinct

TRACE_VERSION = 1


@dataclass(frozen=True)
class Trace:
    """steps[s][l] is int16 (T, K): the experts that layer l asked for in step s, NOT_MINE where a pair does not count.

    T may differ between steps and layers.
    """

    model: str
    num_experts_L: tuple[int, ...]
    steps: tuple[tuple[NDArray[np.int16], ...], ...]

    def save(self, path: str | Path) -> None:
        """A NumPy archive: a header in JSON, the shapes of all arrays and their values in a row."""
        arrays = [ids_TK for step in self.steps for ids_TK in step]
        header = {
            "format": "monde-trace",
            "version": TRACE_VERSION,
            "model": self.model,
            "num_experts_L": self.num_experts_L,
        }
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                header=np.frombuffer(json.dumps(header).encode(), np.uint8),
                shapes=np.array([ids_TK.shape for ids_TK in arrays], np.int64).reshape(-1, 2),
                ids=np.concatenate([ids_TK.ravel() for ids_TK in arrays] or [np.zeros(0, np.int16)]),
            )

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Errors: ValueError when the file is no trace or of another version; FileNotFoundError when it is absent."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{path}: no such record of routing; write one with `monde generate` or `bench --record-routing`"
            )
        try:
            with np.load(path) as file:
                header = json.loads(file["header"].tobytes())
                shapes, ids = file["shapes"], file["ids"]
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path}: not a record of routing; write one with `monde generate` or `bench --record-routing`"
            ) from error
        if header.get("format") != "monde-trace" or header.get("version") != TRACE_VERSION:
            raise ValueError(
                f"{path}: {header.get('format')} version {header.get('version')}, expected monde-trace version "
                f"{TRACE_VERSION}; write one again"
            )
        ends = np.cumsum(shapes.prod(axis=1))
        arrays = (
            [part.reshape(shape) for part, shape in zip(np.split(ids, ends[:-1]), shapes, strict=True)]
            if len(shapes)
            else []
        )
        num_layers = len(header["num_experts_L"])
        steps = tuple(tuple(arrays[s : s + num_layers]) for s in range(0, len(arrays), max(num_layers, 1)))
        return cls(header["model"], tuple(header["num_experts_L"]), steps)

    def check(self, asked_by: str, num_experts_L: Sequence[int]) -> None:
        """Errors: ValueError when the record is not of a model with these layers."""
        mine = self.num_experts_L
        if mine != tuple(num_experts_L):
            raise ValueError(
                f"{asked_by}: it is of {self.model or 'a model'} with {len(mine)} layers of {distinct(mine)} experts, "
                f"this one has {len(num_experts_L)} of {distinct(num_experts_L)}; give the trace of this model"
            )


class TraceRecorder:
    """Collects routing on the device of the ids; `finish` copies it to the host at once."""

    def __init__(self, num_experts_L: Sequence[int]) -> None:
        self.num_experts_L = tuple(num_experts_L)
        self._steps: list[list[Tensor | None]] = []

    def step(self) -> None:
        """One step of the model begins."""
        self._steps.append([None] * len(self.num_experts_L))

    def record(self, layer_idx: int, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> None:
        """The routed pairs of one layer; copied, so the caller may reuse its tensors.

        A record that begins in the middle of a step has the rest of it.
        """
        if not self._steps:
            self.step()
        num_experts = self.num_experts_L[layer_idx]
        counts_TK = (topk_ids_TK >= 0) & (topk_ids_TK < num_experts) & (topk_weights_TK != 0)
        self._steps[-1][layer_idx] = torch.where(counts_TK, topk_ids_TK, NOT_MINE).to(torch.int16)

    def finish(self, model: str = "") -> Trace:
        """Layers that a step did not reach have no tokens there."""
        empty = np.zeros((0, 0), np.int16)
        steps = tuple(
            tuple(empty if ids_TK is None else ids_TK.cpu().numpy() for ids_TK in step)
            for step in self._steps
        )
        return Trace(model, self.num_experts_L, steps)


def hits(placements: Sequence[Placement], step: Sequence[NDArray[np.int16]]) -> tuple[int, int]:
    """(pairs whose expert has a slot, pairs that count) of one step."""
    num_hits = num_pairs = 0
    for placement, ids_TK in zip(placements, step, strict=True):
        ids = ids_TK[ids_TK != NOT_MINE]
        num_pairs += len(ids)
        num_hits += int(np.count_nonzero(placement.slot_E[ids] >= 0))
    return num_hits, num_pairs


def hit_rate(placements: Sequence[Placement], trace: Trace) -> float:
    """Share of a trace's pairs that a fixed placement finds on the device; 0 for a trace without pairs."""
    counts = np.array([hits(placements, step) for step in trace.steps]).reshape(-1, 2).sum(axis=0)
    return float(counts[0] / counts[1]) if counts[1] else 0.0
