"""Who has the CPU's cores in a decode step of a model on the CPU: the threads of monde's kernels.

Experts and dense layers of a few rows run on those, and they look for the next layer's work without a pause. What is
left to torch is small, and its own threads would take turns with them on the same cores: a step of 1 B parameters on
two cores took 27 ms with torch's two threads, 17 with one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from monde.models.dense import HostLinear


class _OneThread:
    """Hooks around a model's forward: one thread of torch's while few rows are computed, then as before."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._before: int | None = None

    def enter(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and 0 < ids.numel() <= self._max_rows and self._before is None:
            self._before = torch.get_num_threads()
            torch.set_num_threads(1)

    def leave(self, model: nn.Module, args: Any, outputs: Any) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None


def give_cores_to_decode(model: nn.Module) -> None:
    """For a model whose dense layers have monde's kernel; others keep torch's threads."""
    kernels = [m._kernel for m in model.modules() if isinstance(m, HostLinear) and m._kernel is not None]
    if kernels:
        threads = _OneThread(kernels[0].max_tokens)
        model.register_forward_pre_hook(threads.enter, with_kwargs=True)
        model.register_forward_hook(threads.leave, always_call=True)
