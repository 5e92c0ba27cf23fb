"""transformers as a runner, in each of its own ways to compute experts, next to which monde is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import torch

from monde.cli.options import LoadOptions
from monde.cli.records import BenchTest, ModelFacts
from monde.cli.runners import Runner, auto_class, runner_facts, watched
from monde.models.configuration import read_configuration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAYS = ("eager", "grouped_mm", "batched_mm")
GIB = 2**30


def parse_baselines(names: list[str]) -> list[str]:
    """Labels of the baselines asked for: transformers as it comes, or each way by name; best is all three.

    Errors: ValueError for any other name.
    """
    labels: list[str] = []
    for name in names:
        library, _, way = name.partition(":")
        if library != "transformers" or way not in ("", "best", *WAYS):
            ways = ", ".join(("best", *WAYS))
            raise ValueError(
                f"--baseline {name}: expected transformers, or transformers:WAY, WAY being one of {ways}"
            )
        labels += [f"transformers:{one}" for one in WAYS] if way == "best" else [name.rstrip(":")]
    return list(dict.fromkeys(labels))


def load_transformers(options: LoadOptions, facts: ModelFacts, labels: list[str]) -> list[Runner]:
    """One model in transformers, run in each of the ways that `labels` name.

    On a GPU it gets the same limits as monde, through accelerate's max_memory.
    Errors: ValueError when it does not fit next to monde, or knows one way only.
    """
    if facts.model_type == "nllb-moe":
        raise ValueError(
            "--baseline: transformers runs experts 0 and 1 of nllb-moe alone, monde those that its router asks for; "
            "measure it without --baseline"
        )
    _check_room(facts)
    placement = _placement(options)
    auto = auto_class(read_configuration(options.model))
    model, loading = watched(
        lambda: auto.from_pretrained(options.model, dtype=options.torch_dtype(), **placement)
    )
    switchable = model._can_set_experts_implementation()
    default_way = getattr(model.config, "_experts_implementation", None) or "eager"
    runners = []
    for label in labels:
        way = label.partition(":")[2] or default_way
        if ":" in label and not switchable:
            raise ValueError(
                f"--baseline {label}: {facts.model_type} has one way only; use --baseline transformers"
            )
        runner = Runner(runner_facts(label, way, model, loading), model)
        if switchable:
            runner.activate = _switch(model, way)
        if way == "batched_mm":
            runner.why_not = _too_large(model)
        runners.append(runner)
    return runners


def _switch(model: PreTrainedModel, way: str) -> Callable[[], None]:
    return lambda: model.set_experts_implementation(way)


def _too_large(model: PreTrainedModel) -> Callable[[BenchTest], str]:
    """batched_mm copies the weights of every routed pair, tens of GiB for a prompt; 1.5x covers the rest."""
    pair_bytes = max((_expert_bytes(module) for module in model.modules()), default=0)
    num_experts_per_token = getattr(model.config.get_text_config(), "num_experts_per_tok", 1)

    def why_not(test: BenchTest) -> str:
        num_pairs = test.batch * max(test.num_prompt, test.depth, 1) * num_experts_per_token
        need_bytes, free_bytes = num_pairs * pair_bytes, _free_bytes(model.device)
        if need_bytes * 1.5 <= free_bytes:
            return ""
        return (
            f"would copy {need_bytes / GIB:.1f} GiB of weights a layer; {free_bytes / GIB:.1f} GiB are free"
        )

    return why_not


def _expert_bytes(module: Any) -> int:
    """Bytes of one expert where `module` holds the stacked weights of many, else 0."""
    stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    return sum(p.nbytes // p.shape[0] for p in stacked)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _check_room(facts: ModelFacts) -> None:
    free_bytes = _free_bytes(torch.device("cpu"))
    if torch.cuda.is_available():
        free_bytes += _free_bytes(torch.device("cuda"))
    if facts.weight_bytes > free_bytes:
        raise ValueError(
            f"--baseline: {facts.weight_bytes / GIB:.1f} GiB of weights do not fit next to monde's, "
            f"{free_bytes / GIB:.1f} GiB are free; run without --baseline or with a smaller model"
        )


def _placement(options: LoadOptions) -> dict[str, Any]:
    """from_pretrained's arguments for the device and limits that monde was given."""
    if options.device == "cpu" or not torch.cuda.is_available():
        return {}
    device = torch.device(options.device or "cuda:0")
    if options.gpu_memory is None:
        return {"device_map": {"": device}}
    limits: dict[int | str, str | int] = {device.index or 0: options.gpu_memory}
    limits["cpu"] = options.host_memory or psutil.virtual_memory().available
    return {"device_map": "auto", "max_memory": limits}
