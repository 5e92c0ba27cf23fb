"""A model whose experts lie on several ranks: the group it loads with, what all of them check, and `generate`.

Under a mesh every forward of the model is a step of all ranks. `generate` on one rank may need fewer steps than on
another: those that are done go on, without use of the result, until all are (transformers' synced_gpus), and who is
done is asked within the mesh, not in the world. What one rank raises in a forward or in `generate`, all are told.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hostcompute.topology import choose_cores, default_cores
from monde.config import MondeConfig
from monde.engine import Engine
from monde.executors.ranks import RankGroup, ranks_of_mesh

_DIGEST_BYTES = 2**16  # of every parameter


@contextlib.contextmanager
def loading_together(config: MondeConfig) -> Iterator[RankGroup | None]:
    """The ranks of config's mesh, None without one. What fails in here on one of them fails on all."""
    if config.mesh is None:
        yield None
        return
    ranks = ranks_of_mesh(config.mesh, config.mesh_timeout_s)
    with ranks.together():
        yield ranks


def check_same_weights(model: nn.Module, engine: Engine) -> None:
    """When all are there: ranks with other weights would give an answer of neither model.

    Errors: ValueError on all ranks where a sample of every parameter or of an expert's matrices differs.
    """
    if engine.ranked is not None:
        engine.ranked.ranks.agree_same({"dense weights (digest)": _digest(model)})
        engine.ranked.check_same_experts()


def run_over_ranks(model: Any, engine: Engine, ranks: RankGroup) -> None:
    """What remains to be done when all weights are there; all ranks are here. A step's graph cannot hold exchanges."""
    if engine.device.type == "cpu":
        # torchrun gives torch one thread, other launchers one for every core of the machine.
        num_threads = engine.config.num_threads
        cores = choose_cores(num_threads, ranks.cores) if num_threads else default_cores(ranks.cores)
        torch.set_num_threads(len(cores))
    engine.loaded()
    _step_together(model, ranks)


def _digest(model: nn.Module) -> int:
    total = 0
    for name, param in sorted(model.named_parameters()):
        words = param.detach().contiguous().view(-1).view(torch.uint8)
        words = words[:: max(1, len(words) // _DIGEST_BYTES)].long()
        place = (
            torch.arange(1, len(words) + 1, device=words.device) % 65521
        )  # values in another order are others
        total = (total * 31 + int((words * place).sum()) + len(name)) % 2**61
    return total


def _step_together(model: Any, ranks: RankGroup) -> None:
    """Let calls of the model, and of `model.generate`, end on all ranks at once."""
    if not isinstance(model, _SteppingTogether):
        cls: Any = type(model)
        model.__class__ = _class_together(cls)
        model._ranks = ranks


@functools.cache
def _class_together(cls: Any) -> Any:
    """A subclass that goes by the same name: configs, pipelines and errors name the model's class."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    if hasattr(cls, "generate"):

        @functools.wraps(cls.generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self._ranks is None:
                return cls.generate(self, *args, **kwargs)
            if kwargs.get("synced_gpus") is None:
                kwargs["synced_gpus"] = True
            with self._ranks.one_call():
                return cls.generate(self, *args, **kwargs)

        names["generate"] = generate
    return type(cls.__name__, (_SteppingTogether, cls), names)


class _SteppingTogether:
    """Mixed into the model's class; see the top of the file."""

    _ranks: RankGroup | None = (
        None  # a class of its own __init__ makes a model without ranks, as save and load do
    )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Any = super().__call__  # type: ignore[misc]
        if self._ranks is None:
            return forward(*args, **kwargs)
        with self._ranks.one_call():
            return forward(*args, **kwargs)

    def _has_unfinished_sequences(
        self, this_peer_finished: bool, synced_gpus: bool, device: torch.device
    ) -> bool:
        if self._ranks is None or not synced_gpus:
            return not this_peer_finished
        unfinished = torch.tensor([not this_peer_finished], dtype=torch.int32)
        return bool(self._ranks.exchange(unfinished).any())
