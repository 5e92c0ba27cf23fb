"""What a runner is, and monde as one. The runners to compare with are in baselines.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch

from monde.cli.options import LoadOptions
from monde.cli.records import BenchTest, Loading, ModelFacts, RunnerFacts
from monde.core import Counters
from monde.models.memory import PeakMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Runner:
    """A loaded model and how to make it run one way.

    `activate` comes before every use, because baselines share a model.
    """

    facts: RunnerFacts
    model: PreTrainedModel
    activate: Callable[[], None] = field(default=lambda: None)
    counters: Callable[[], Counters] | None = None
    reset_counters: Callable[[], None] = field(default=lambda: None)
    slowest_s: Callable[[float], float] = field(default=lambda duration_s: duration_s)  # of all ranks
    why_not: Callable[[BenchTest], str] = field(default=lambda test: "")  # a reason to skip a test, or ""


def model_facts(options: LoadOptions) -> ModelFacts:
    """Counted on a model without memory, so that every runner is judged by the same numbers.

    Errors: ValueError when the configuration cannot be had or is not one of a language model.
    """
    from monde.models.configuration import read_configuration
    from monde.models.positions import positions_of

    config = read_configuration(options.model)
    with torch.device("meta"):
        try:
            model = auto_class(config).from_config(config)
        except ValueError as error:
            raise ValueError(
                f"{options.model}: `monde bench` times language models, not {config.model_type}"
            ) from error
    wanted = options.torch_dtype()
    dtype = wanted if isinstance(wanted, torch.dtype) else getattr(config, "dtype", None) or torch.float32
    num_params = sum(p.numel() for p in model.parameters())
    return ModelFacts(
        name=options.model.rstrip("/").split("/")[-1],
        model_type=config.model_type,
        num_params=num_params,
        weight_bytes=num_params * dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=config.get_text_config().vocab_size,
        num_positions=positions_of(config),
        is_encoder_decoder=config.is_encoder_decoder,
    )


def auto_class(config: Any) -> Any:
    """The class of transformers that makes language models of this kind."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_monde(options: LoadOptions) -> Runner:
    """The model through monde."""
    model, loading = watched(options.load_with_monde)
    engine: Any = model.monde
    report, backend = engine.load_report, f"{engine.host_choice.name}/{engine.host_choice.isa}"
    if report.num_resident_experts:
        backend += f", {report.num_resident_experts}/{report.num_experts} experts on the GPU"
    if report.num_released_experts:
        backend += f", {engine.plan.released_text}"
    if options.deferred_experts:
        backend += f", {options.deferred_experts} experts a token deferred"
    if engine.ranked is not None:
        return _over_ranks(engine, backend, model, loading)
    facts = runner_facts("monde", backend, model, loading)
    return Runner(facts, model, counters=engine.counters, reset_counters=engine.reset_counters)


def _over_ranks(engine: Any, backend: str, model: PreTrainedModel, loading: Loading) -> Runner:
    ranks = engine.ranked.ranks
    facts = runner_facts("monde", f"{backend}, {engine.config.parallel}", model, loading)
    return Runner(
        replace(facts, num_ranks=ranks.size),
        model,
        counters=engine.counters,
        reset_counters=engine.reset_counters,
        slowest_s=lambda duration_s: float(max(ranks.agree(duration_s))),
    )


def watched(load: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, Loading]:
    """Run `load` and measure what it cost."""
    start_s, start_bytes = time.perf_counter(), _resident_bytes()
    with PeakMemory() as memory:
        model = load()
    return model, Loading(time.perf_counter() - start_s, memory.stop(), _resident_bytes() - start_bytes)


def runner_facts(label: str, backend: str, model: PreTrainedModel, loading: Loading) -> RunnerFacts:
    return RunnerFacts(label, backend, str(model.device), torch.get_num_threads(), loading)


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
