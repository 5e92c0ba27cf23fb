"""One decode step after another, each timed: the caches at their position, eager and captured steps, the clock.

Letters: S steps, B sequences of a batch, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

NUM_EARLY = 16  # tokens of a generation that are eager steps, warm-ups and the capture
NUM_NEW = 64  # positions behind the context; longer runs go back to it


@dataclass(frozen=True)
class Case:
    """So many sequences with so many tokens in the cache."""

    batch: int
    context: int

    @property
    def num_positions(self) -> int:
        return self.context + NUM_NEW


class Steps(Protocol):
    def __call__(self, ids_B1: Tensor) -> Tensor:
        """Logits [B, 1, V]; need not have been computed yet."""
        ...

    def rewind(self) -> None:
        """Back to the context."""
        ...


class StaticSteps:
    """model(...) on a static cache, whatever the model makes of it: monde's replays its graph.

    change: what is done to the cache before its first step.
    """

    def __init__(
        self, model: Any, case: Case, change: Callable[[StaticCache], None] = lambda cache: None
    ) -> None:
        self._model, self._case = model, case
        self.cache = static_cache_at(model, case)
        change(self.cache)

    def __call__(self, ids_B1: Tensor) -> Tensor:
        logits: Tensor = self._model(
            ids_B1, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self._case.context)


class GrowingSteps(StaticSteps):
    """The same on a cache that grows, which is what generate takes if nobody asks for another."""

    def __init__(self, model: Any, case: Case) -> None:
        self._model, self._case = model, case
        self.rewind()

    def rewind(self) -> None:
        self.cache = DynamicCache(config=self._model.config)  # the old one goes before the new one is filled
        for layer_idx in range(self._model.config.num_hidden_layers):
            keys, values = (
                random_states(self._model, self._case.batch, self._case.context) for _ in range(2)
            )
            self.cache.update(keys, values, layer_idx)


class GraphedSteps(StaticSteps):
    """The unmodified forward as one CUDA graph, the way torch's documentation captures one."""

    def __init__(
        self, model: Any, case: Case, change: Callable[[StaticCache], None] = lambda cache: None
    ) -> None:
        super().__init__(model, case, change)
        self._ids_B1 = torch.zeros(case.batch, 1, dtype=torch.long, device=model.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                super().__call__(self._ids_B1)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = super().__call__(self._ids_B1)
        self.rewind()

    def __call__(self, ids_B1: Tensor) -> Tensor:
        self._ids_B1.copy_(ids_B1)
        self._graph.replay()
        return self._logits


def static_cache_at(model: Any, case: Case) -> StaticCache:
    """A cache that holds `context` random keys and values: what they are changes no time."""
    cache = StaticCache(config=model.config, max_cache_len=case.num_positions)
    one = random_states(model, case.batch, 1)
    for layer in cache.layers:
        layer.lazy_initialization(one, one)
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(case.context)
    return cache


def random_states(model: Any, batch: int, num_positions: int) -> Tensor:
    """Keys or values of one layer, [B, heads, positions, head dim]."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, num_positions, head_dim)
    return torch.randn(shape, dtype=model.dtype, device=model.device)


class Decoding:
    """Steps fed with random tokens, so that no two route alike; every step ends with its tokens on the host."""

    def __init__(self, steps: Steps, vocab_size: int, batch: int, device: torch.device) -> None:
        self._steps, self._num_since_rewind = steps, 0
        generator = torch.Generator().manual_seed(1)
        self._ids_SB1 = torch.randint(vocab_size, (4 * NUM_NEW, batch, 1), generator=generator).to(device)
        self._num_steps = 0

    @torch.no_grad()
    def run(self, num_steps: int) -> list[float]:
        """Seconds of every step."""
        samples = []
        for _ in range(num_steps):
            if self._num_since_rewind == NUM_NEW:
                self._steps.rewind()
                self._num_since_rewind = 0
            ids_B1 = self._ids_SB1[self._num_steps % len(self._ids_SB1)]
            _synchronize(ids_B1.device)
            start_s = time.perf_counter()
            self._steps(ids_B1)[:, -1].argmax(-1).tolist()
            samples.append(time.perf_counter() - start_s)
            self._num_since_rewind += 1
            self._num_steps += 1
        return samples

    def restart(self) -> None:
        """The next step is the first one after the context."""
        self._steps.rewind()
        self._num_since_rewind = 0


class _Clock(BaseStreamer):
    """When each token came out of generate."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None: ...


def generated(model: Any, case: Case, num_steps: int, before_decode: Callable[[], None]) -> list[float]:
    """Seconds between the tokens of a plain `model.generate` that samples, after a prompt of `context` tokens.

    before_decode is called after NUM_EARLY tokens; the steps after it are returned.
    """
    ids_BT = torch.randint(model.config.vocab_size, (case.batch, case.context), device=model.device)
    num_new, clock, skip = min(NUM_EARLY + num_steps, NUM_NEW), _Clock(), NUM_EARLY
    put = clock.put

    def put_and_tell(value: Tensor) -> None:
        put(value)
        if len(clock.times_s) == skip:
            before_decode()
            clock.times_s[-1] = time.perf_counter()

    clock.put = put_and_tell  # type: ignore[method-assign]
    model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=True,
        top_k=0,
        streamer=clock,
    )
    times_s = clock.times_s[skip - 1 :]
    return [after - before for before, after in itertools.pairwise(times_s)]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
