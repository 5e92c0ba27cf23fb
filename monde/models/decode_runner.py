"""Recognising, recording and replaying the decode steps of one model; see decode_graph.py for the whole."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_chunked_causal_mask
from transformers.utils.generic import ModelOutput

from monde.models import gpu_attention
from monde.models.decode_cache import (
    MIN_POSITIONS,
    CachePool,
    CacheState,
    KvRoom,
    PooledCache,
    add_in_one_launch,
    static_cache,
    why_not_static,
)
from monde.models.decode_capture import Capture, Graph
from monde.models.decode_inputs import NotCapturableError, StaticArguments, StepArguments

NUM_WARM_UPS = 3  # libraries load kernels and choose algorithms in the first runs on a stream
CAPTURE_AFTER_STEPS = 8  # the warm-ups, the capture in Python and instantiation, in eager steps
_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
# Flash attention unpads on the host, flex attention compiles itself.
_ATTENTION = ("sdpa", "eager", gpu_attention.NAME)
_EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states")


@runtime_checkable
class StepHooks(Protocol):
    """What the engine does around a decode step: wake the host's pollers; change residency, raise what failed.

    finish comes after a whole generation, whose latest step may have failed without anybody having noticed.
    is_recording: what is routed where is written down, which no graph does.
    """

    @property
    def is_recording(self) -> bool: ...

    def begin_step(self) -> None: ...

    def before_replay(self) -> None: ...

    def end_step(self) -> None: ...

    def finish(self) -> None: ...


class NoHooks:
    is_recording = False

    def begin_step(self) -> None: ...

    def before_replay(self) -> None: ...

    def end_step(self) -> None: ...

    def finish(self) -> None: ...


@dataclass
class Lease:
    """One call of generate: the caches that it took, and why its steps run eagerly if they do."""

    taken: list[PooledCache] = field(default_factory=list)
    why_not: str | None = None

    def keep_from_pool(self, cache: object) -> None:
        """The caller got this cache, so it must not serve another call."""
        self.taken = [pooled for pooled in self.taken if pooled.cache is not cache]


@dataclass
class _Recorded:
    """One kind of step on one cache: counted first, then recorded."""

    num_eager: int = 0
    arguments: StaticArguments | None = None
    graph: Graph | None = None


@dataclass
class _OnCache:
    """What is recorded on one cache."""

    state: CacheState
    steps: dict[Hashable, _Recorded] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelTraits:
    """What the runner knows about its model; why_not: why none of its steps can be captured."""

    config: Any
    forward_names: tuple[str, ...]
    why_not: str | None


class DecodeRunner:
    """Recognises decode steps of one model, records and replays them.

    Graphs live as long as the cache that they write to. `num_captures` and `num_replays` count since install.
    """

    def __init__(self, traits: ModelTraits, capture: Capture, room: KvRoom, hooks: StepHooks) -> None:
        self.traits, self.capture, self.hooks = traits, capture, hooks
        self.pool = CachePool(traits.config, room, capture)
        self.num_captures = self.num_replays = 0
        self._on_cache: weakref.WeakKeyDictionary[Any, _OnCache] = weakref.WeakKeyDictionary()
        self._leases = threading.local()
        self._lock = (
            threading.RLock()
        )  # one step at a time: graphs share a memory pool and the engine's mailbox
        self._off: str | None = None
        self._warned: set[str] = set()

    # ---- generate ----
    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """Caches taken inside return to the pool at the end."""
        outer = getattr(self._leases, "current", None)
        lease = self._leases.current = Lease()
        try:
            yield lease
        finally:
            self._leases.current = outer
            for pooled in lease.taken:
                on_cache = self._on_cache.get(pooled.cache)
                if on_cache is not None:
                    on_cache.state.rebind(pooled.cache, copy=False)
                self.pool.give(pooled)

    def prepare_cache(
        self, config: Any, model_kwargs: dict[str, Any], mode: Any, num_rows: int, num_positions: int
    ) -> bool:
        """Put a static cache into `model_kwargs`. False: transformers shall make the cache that it would make."""
        lease = getattr(self._leases, "current", None)
        if lease is None or config.use_cache is False or config.compile_config is not None:
            return False
        num_rows *= max(config.num_beams or 1, config.num_return_sequences or 1)
        num_positions = max(num_positions, config.max_cache_len or 0)
        given = model_kwargs.get("past_key_values")
        reason = _why_not_generation(config, model_kwargs, mode)
        if given is not None:
            reason = self._off or self.traits.why_not or reason or why_not_static(given)
        else:
            reason = self.why_not_cache(num_rows, num_positions) or reason
        if reason is not None:
            lease.why_not = reason
            self._warn(reason)
            return False
        config.disable_compile = True  # transformers compiles the forward wherever it meets a static cache
        if given is not None:
            return False
        pooled = self.pool.take(num_rows, num_positions)
        lease.taken.append(pooled)
        model_kwargs["past_key_values"] = pooled.cache
        return True

    def why_not_cache(self, num_rows: int, num_positions: int) -> str | None:
        """Why no graph can write a cache of this size; None where one can."""
        return self._off or self.traits.why_not or self.pool.why_not(num_rows, num_positions)

    # ---- one step ----
    def call(self, model: Any, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """`forward(*args, **kwargs)`, as a graph where that is possible."""
        kwargs = {**dict(zip(self.traits.forward_names, args, strict=False)), **kwargs}
        if not self._is_decode_step(model, kwargs):
            return forward(**kwargs)
        cache = kwargs["past_key_values"]
        lease = getattr(self._leases, "current", None)
        reason = self._off or (lease and lease.why_not) or self.traits.why_not
        reason = reason or why_not_static(cache) or _why_not_step(kwargs) or _why_not_masks(kwargs)
        if reason is None and any(
            layer.keys is None for layer in cache.layers if hasattr(layer, "max_cache_len")
        ):
            return forward(**kwargs)  # a prompt of one token
        with self._step():
            if self.hooks.is_recording:
                return forward(**kwargs)
            if reason is None:
                try:
                    return self._run(
                        forward, StepArguments.of(kwargs), cache, model.config._attn_implementation
                    )
                except NotCapturableError as error:
                    reason = str(error)
            self._warn(reason)
            return forward(**kwargs)

    def _is_decode_step(self, model: Any, kwargs: dict[str, Any]) -> bool:
        ids_B1 = kwargs.get("input_ids")
        return (
            isinstance(ids_B1, Tensor)
            and ids_B1.dim() == 2
            and ids_B1.shape[1] == 1
            and ids_B1.device.type == self.capture.device_type
            and kwargs.get("past_key_values") is not None
            and kwargs.get("inputs_embeds") is None
            and not model.training
            and not torch.is_grad_enabled()
            and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        )

    def _run(self, forward: Callable[..., Any], step: StepArguments, cache: Any, attention: str) -> Any:
        on_cache = self._on_cache.get(cache)
        if on_cache is None or not on_cache.state.fits(cache):
            add_in_one_launch(cache)
            on_cache = self._on_cache[cache] = _OnCache(CacheState(cache))
        on_cache.state.rebind(cache)
        device_type = self.capture.device_type
        autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
        key = (step.key, attention, autocast)
        recorded = on_cache.steps.setdefault(key, _Recorded())
        if recorded.graph is None:
            if recorded.num_eager < CAPTURE_AFTER_STEPS:
                recorded.num_eager += 1
                return forward(**step.kwargs)
            self._record(recorded, forward, step, cache, on_cache.state)
        assert recorded.graph is not None
        assert recorded.arguments is not None
        recorded.arguments.fill(step)
        self.capture.enter()
        self.hooks.before_replay()
        recorded.graph.replay()
        self.num_replays += 1
        kind, values = recorded.graph.outputs
        # Clones: callers keep logits, and the next step writes to the graph's own.
        values = pytree.tree_map_only(Tensor, torch.clone, values)
        self.capture.leave()
        return kind(**values, past_key_values=cache)

    def _record(
        self,
        recorded: _Recorded,
        forward: Callable[..., Any],
        step: StepArguments,
        cache: Any,
        state: CacheState,
    ) -> None:
        """Warm up and capture; the cache is as before. Errors: NotCapturableError, and no more attempts."""
        arguments, cache_ref, lengths = StaticArguments(step), weakref.ref(cache), state.lengths()

        def run() -> tuple[type, dict[str, Any]]:
            alive = cache_ref()
            assert alive is not None
            return _without_cache(forward(**arguments.kwargs(alive)))

        self.capture.enter()
        try:
            for _ in range(NUM_WARM_UPS):
                self.capture.warm_up(run)
                state.restore(lengths)
            recorded.graph = self.capture.capture(run)
            recorded.arguments = arguments
            self.num_captures += 1
        except Exception as error:
            self._off = f"capture failed: {error}"
            raise NotCapturableError(self._off) from error
        finally:
            state.restore(lengths)
            self.capture.leave()

    @contextmanager
    def _step(self) -> Iterator[None]:
        with self._lock:
            self.hooks.begin_step()
            try:
                yield
            finally:
                self.hooks.end_step()

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"decode steps run eagerly, without a CUDA graph: {reason}", RuntimeWarning, stacklevel=4
            )

    # ---- life ----
    def forget(self) -> None:
        """Drop every graph and idle cache."""
        self.pool.clear()
        self._on_cache.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeRunner:
        """A copied model has other addresses: it starts without graphs, and shares the engine."""
        return DecodeRunner(self.traits, self.capture, self.pool.room, self.hooks)


def why_not_model(model: Any) -> str | None:
    if model.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if not model._supports_default_dynamic_cache():
        return "the model makes its own kind of cache"
    attention = model.config._attn_implementation
    if attention not in _ATTENTION:
        return f"attention by {attention} works on the host in every step"
    chunked = "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())
    if chunked and "block_sequence_ids" not in inspect.signature(create_chunked_causal_mask).parameters:
        return "this transformers cannot mask chunked attention over a static cache; a later one can (5.23)"
    try:
        cache = static_cache(model.config, MIN_POSITIONS)
    except (
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # transformers has no static layer for some layer types
        return f"the model has no static cache: {error!r}"
    return why_not_static(cache)


def _why_not_generation(config: Any, model_kwargs: dict[str, Any], mode: Any) -> str | None:
    if mode not in _MODES or config.is_assistant:
        return f"{'assisted' if config.is_assistant else mode.value.replace('_', ' ')} generation crops its cache"
    if config.cache_implementation not in (None, "static"):
        return f"cache_implementation={config.cache_implementation!r} was asked for"
    return _why_not_step(model_kwargs)


def _why_not_step(kwargs: dict[str, Any]) -> str | None:
    for name in _EXTRA_OUTPUTS:
        if kwargs.get(name):
            return f"{name} was asked for"
    if kwargs.get("return_dict") is False:
        return "return_dict=False was asked for"
    return None


def _why_not_masks(kwargs: dict[str, Any]) -> str | None:
    mask = kwargs.get("attention_mask")
    masks = mask.values() if isinstance(mask, dict) else [mask]
    if any(isinstance(m, Tensor) and m.dim() == 2 for m in masks):
        return "a 2-D attention mask grows with every step; pass a 4-D mask, or none where nothing is padded"
    return None


def _without_cache(outputs: Any) -> tuple[type, dict[str, Any]]:
    """The type of the outputs and all but the cache; a graph must not keep its cache alive."""
    if not isinstance(outputs, ModelOutput):
        raise NotCapturableError(f"the model returns a {type(outputs).__name__}, not a ModelOutput")
    return type(outputs), {name: value for name, value in outputs.items() if name != "past_key_values"}
