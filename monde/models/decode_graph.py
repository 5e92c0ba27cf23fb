"""One decode step of the whole model as one CUDA graph, used by plain `model.generate(...)`.

`install` gives a model a subclass of its own class with three changes:
    generate                       the cache that it takes returns to a pool, with the graphs that write to it
    _prepare_cache_for_generation  a static cache from that pool, where transformers would make a dynamic one
    __call__                       a decode step (input_ids_B1, a static cache, no gradient) runs as a graph
A step is captured after CAPTURE_AFTER_STEPS eager steps of the same kind: about what capturing costs, so that
no generation takes more than twice the better of the two ways, and short ones are not charged for a capture.
Where a step cannot be captured it runs eagerly, and a warning says why, once per model and reason.

Forward hooks run when a step is captured, not when it is replayed. A compiled `model.forward` is captured as it
is; inside torch.compile's own tracing the wrapper steps aside.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationMixin, StaticCache

from monde.models.decode_cache import KvRoom
from monde.models.decode_capture import Capture, CudaCapture
from monde.models.decode_runner import DecodeRunner, ModelTraits, NoHooks, StepHooks, why_not_model


def install(model: Any, capture: Capture, room: KvRoom, engine: object = None) -> None:
    """Let decode steps of `model` run as graphs made by `capture`, with caches within `room`."""
    hooks = engine if isinstance(engine, StepHooks) else NoHooks()
    cls: Any = type(model)
    if not issubclass(cls, _Decoding):
        model.__class__ = _decoding_class(cls)
    traits = ModelTraits(
        model.config, tuple(inspect.signature(model.forward).parameters), why_not_model(model)
    )
    model._decode_runner = DecodeRunner(traits, capture, room, hooks)


def install_on_gpu(model: Any, engine: Any) -> None:
    """The same for a model that monde runs. On a CPU there is nothing to capture, and some models have no decode steps."""
    if engine.device.type == "cuda" and isinstance(model, GenerationMixin):
        size = engine.plan.size
        room = KvRoom(size.kv_bytes, size.kv_bytes_per_token)
        install(model, CudaCapture(engine.device), room, engine)


@contextlib.contextmanager
def step_cache(model: Any, num_rows: int, num_positions: int) -> Iterator[StaticCache | None]:
    """A cache whose decode steps run as graphs, for callers that step a model themselves; it returns to the pool.

    None where `model` has no graphs or the plan no room: then the model's own kind of cache will do.
    """
    runner = getattr(model, "_decode_runner", None)
    if runner is None or runner.why_not_cache(num_rows, num_positions):
        yield None
        return
    with runner.lease() as lease:
        pooled = runner.pool.take(num_rows, num_positions)
        lease.taken.append(pooled)
        yield pooled.cache


@functools.cache
def _decoding_class(cls: Any) -> Any:
    """A subclass that goes by the same name: configs, pipelines and errors name the model's class."""

    @functools.wraps(cls.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        runner = self._decode_runner
        if runner is None or kwargs.get("custom_generate") is not None:
            return cls.generate(self, *args, **kwargs)
        with runner.lease() as lease:
            result = cls.generate(self, *args, **kwargs)
            lease.keep_from_pool(getattr(result, "past_key_values", None))
            runner.hooks.finish()
            return result

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Decoding, cls), {**names, "generate": generate})


class _Decoding:
    """Mixed into the model's class; see the top of the file. A model made from the class alone has no runner."""

    _decode_runner = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runner = self._decode_runner
        if torch.compiler.is_compiling() or runner is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return runner.call(self, super().__call__, args, kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *sizes: int
    ) -> None:
        runner = self._decode_runner
        if runner is None or not runner.prepare_cache(
            generation_config, model_kwargs, generation_mode, *sizes
        ):
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, *sizes
            )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self._decode_runner is not None:
            self._decode_runner.forget()  # assign=True gives parameters other addresses
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if self._decode_runner is not None:
            self._decode_runner.forget()  # the parameters may move, and graphs know their addresses
        return super()._apply(*args, **kwargs)  # type: ignore[misc]
