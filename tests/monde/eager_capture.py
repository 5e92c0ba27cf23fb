"""A stand-in for CUDA graphs on any device: a step is kept as a callable and run again on the same buffers.

Like a graph it knows nothing of the arguments of later steps: what the runner fails to copy, it computes wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from monde.models.decode_cache import KvRoom
from monde.models.decode_capture import CaptureError, Step
from monde.models.decode_graph import install

ROOM = KvRoom(bytes=64 << 20, bytes_per_token=1 << 10)


@dataclass
class EagerGraph:
    step: Step
    outputs: Any

    def replay(self) -> None:
        new, old = pytree.tree_leaves(self.step()), pytree.tree_leaves(self.outputs)
        for there, here in zip(old, new, strict=True):
            if isinstance(there, Tensor):
                there.copy_(here)
            else:
                assert there == here


@dataclass
class EagerCapture:
    """`failure` is what capturing raises; warm-ups and captures are counted."""

    failure: str | None = None
    device_type: str = "cpu"
    num_warm_ups: int = 0

    def warm_up(self, step: Step) -> None:
        self.num_warm_ups += 1
        step()

    def capture(self, step: Step) -> EagerGraph:
        if self.failure is not None:
            raise CaptureError(self.failure)
        return EagerGraph(step, pytree.tree_map_only(Tensor, torch.clone, step()))

    def enter(self) -> None: ...

    def leave(self) -> None: ...


@dataclass
class CountingHooks:
    """Stands in for the engine: begin and end must alternate."""

    num_steps: int = 0
    num_replays: int = 0
    is_open: bool = False
    is_recording: bool = False

    def begin_step(self) -> None:
        assert not self.is_open
        self.is_open = True

    def before_replay(self) -> None:
        assert self.is_open
        self.num_replays += 1

    def end_step(self) -> None:
        assert self.is_open
        self.is_open = False
        self.num_steps += 1

    def finish(self) -> None:
        assert not self.is_open


def with_graphs(model: Any, engine: object = None, room: KvRoom = ROOM, **settings: Any) -> Any:
    """The model, its decode steps recorded by EagerCapture."""
    install(model, EagerCapture(**settings), room, engine)
    return model
