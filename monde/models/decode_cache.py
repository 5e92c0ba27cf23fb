"""Key/value caches that a captured step can write: which they are, their mutable state, and a pool of them.

A StaticLayer of transformers writes its keys and values in place at `cumulative_length`, a tensor that it
advances in place. So a step is undone by putting the lengths back: the position is written again by the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, StaticCache, StaticLayer, StaticSlidingWindowLayer

from monde.device.kernels.step import append, can_append
from monde.models.decode_capture import Capture
from monde.sizes import format_bytes

MIN_POSITIONS = 256
_STATE = ("keys", "values", "cumulative_length")
_STATELESS: tuple[type, ...] = tuple(filter(None, [getattr(cache_utils, "DummyLayer", None)]))


@dataclass(frozen=True)
class KvRoom:
    """What the memory plan keeps for keys and values. bytes_per_token sums all layers."""

    bytes: int
    bytes_per_token: int

    def bytes_of(self, num_rows: int, num_positions: int) -> int:
        return num_rows * num_positions * self.bytes_per_token


def static_cache(config: Any, num_positions: int) -> StaticCache:
    """A StaticCache whose sliding-window layers keep all positions; nothing is allocated before its first use.

    transformers' own StaticSlidingWindowLayer counts in Python and builds an index on the host once its window is
    full, so it cannot be captured. The mask hides what lies outside the window, at the price of the positions that
    it keeps; the memory plan counts every layer as one with full attention for that reason.
    """
    cache = StaticCache(config=config.get_text_config(decoder=True), max_cache_len=num_positions)
    for i, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            cache.layers[i] = StaticLayer(max_cache_len=num_positions)
    add_in_one_launch(cache)
    return cache


class StepLayer(StaticLayer):
    """A StaticLayer whose decode steps add their key and value in one launch, where transformers' has five."""

    _ticket: Tensor | None = None  # of blocks that have added their part

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values, length = self.keys, self.values, cast(Tensor, self.cumulative_length)
        as_is = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if as_is or keys is None or values is None:
            return super().update(key_states, value_states, *args, **kwargs)
        if not can_append(key_states, value_states, keys, values):
            return super().update(key_states, value_states, *args, **kwargs)
        if self._ticket is None:
            self._ticket = torch.zeros(1, dtype=torch.int32, device=keys.device)
        append(key_states, value_states, keys, values, length, self._ticket)
        return keys, values


_PLAIN = (StaticLayer, StepLayer)


def _plain_layers(cache: Cache) -> list[StaticLayer]:
    return [layer for layer in cache.layers if type(layer) in _PLAIN]  # type: ignore[misc]


def add_in_one_launch(cache: StaticCache) -> None:
    """Let the cache's layers be StepLayers where they are StaticLayers."""
    for layer in cache.layers:
        if type(layer) is StaticLayer:
            layer.__class__ = StepLayer


def why_not_static(cache: object) -> str | None:
    """Why a captured step could not write this cache; None where it could."""
    if not isinstance(cache, StaticCache):
        return f"the cache is a {type(cache).__name__}, which moves as it grows"
    if cache.offloading:
        return "the cache is offloaded to the host"
    for layer in cache.layers:
        if type(layer) not in _PLAIN and not isinstance(layer, _STATELESS):
            return f"the state of a {type(layer).__name__} depends on the host"
    return None


class CacheState:
    """The tensors of a cache that a graph reads and writes, at the addresses they had when it was made."""

    def __init__(self, cache: Cache) -> None:
        self._layers = [
            {name: getattr(layer, name) for name in _STATE} for layer in cache.layers if type(layer) in _PLAIN
        ]

    def lengths(self) -> list[Tensor]:
        return [state["cumulative_length"].clone() for state in self._layers]

    def restore(self, lengths: list[Tensor]) -> None:
        for state, length in zip(self._layers, lengths, strict=True):
            state["cumulative_length"].copy_(length)

    def fits(self, cache: Cache) -> bool:
        """Whether the cache still has the shapes it had; selecting or repeating rows changes them."""
        layers = _plain_layers(cache)
        return len(layers) == len(self._layers) and all(
            layer.keys is not None and layer.keys.shape == state["keys"].shape
            for layer, state in zip(layers, self._layers, strict=True)
        )

    def rebind(self, cache: Cache, copy: bool = True) -> None:
        """Bring tensors that were replaced back to their addresses: beam search reorders out of place."""
        layers = _plain_layers(cache)
        for layer, state in zip(layers, self._layers, strict=True):
            for name, tensor in state.items():
                now = getattr(layer, name)
                if now is not tensor:
                    if copy:
                        tensor.copy_(now)
                    setattr(layer, name, tensor)


@dataclass(frozen=True)
class PooledCache:
    """A cache and what it can serve: rows, positions, and whether it was made in inference mode.

    Tensors made in inference mode cannot be written outside it.
    """

    num_rows: int
    num_positions: int
    is_inference: bool
    cache: StaticCache

    def serves(self, num_rows: int, num_positions: int) -> bool:
        wanted = (num_rows, num_positions, torch.is_inference_mode_enabled())
        return (self.num_rows, self.num_positions, self.is_inference) == wanted


class CachePool:
    """Caches between two calls of generate, so that calls of similar size find their graph again.

    A length is rounded up to a power of two where that fits the room. Idle caches and the one being made stay
    within the room together; the longest unused leave first.
    """

    def __init__(self, config: Any, room: KvRoom, order: Capture) -> None:
        self.config, self.room, self._order = config, room, order
        self._idle: list[PooledCache] = []

    def why_not(self, num_rows: int, num_positions: int) -> str | None:
        """Why a cache of this size would break the plan; None where it would not."""
        need_bytes = self.room.bytes_of(num_rows, num_positions)
        if need_bytes <= self.room.bytes:
            return None
        return (
            f"{num_rows} x {num_positions} positions of keys and values need {format_bytes(need_bytes)} and the plan "
            f"has {format_bytes(self.room.bytes)}; raise max_context or max_batch, or lower max_new_tokens"
        )

    def take(self, num_rows: int, num_positions: int) -> PooledCache:
        """An empty cache of at least `num_positions`."""
        rounded = max(MIN_POSITIONS, 1 << (num_positions - 1).bit_length())
        if self.room.bytes_of(num_rows, rounded) <= self.room.bytes:
            num_positions = rounded
        found = next((idle for idle in self._idle if idle.serves(num_rows, num_positions)), None)
        if found is not None:
            self._idle.remove(found)
            self._order.enter()  # a call that ended early may have left work behind
            found.cache.reset()
            return found
        while (
            self._idle and self._idle_bytes() + self.room.bytes_of(num_rows, num_positions) > self.room.bytes
        ):
            del self._idle[0]
        cache = static_cache(self.config, num_positions)
        return PooledCache(num_rows, num_positions, torch.is_inference_mode_enabled(), cache)

    def give(self, pooled: PooledCache) -> None:
        """Keep the cache for the next call."""
        self._order.leave()
        self._idle.append(pooled)

    def clear(self) -> None:
        self._idle.clear()

    def _idle_bytes(self) -> int:
        return sum(self.room.bytes_of(idle.num_rows, idle.num_positions) for idle in self._idle)
