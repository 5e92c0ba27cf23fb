"""`monde.from_pretrained`: a folder or hub id in, a running model out."""

from __future__ import annotations

import difflib
import inspect
import os
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from monde.config import MondeConfig
from monde.models.configuration import HUB_SETTINGS, read_configuration, refuse_quantised
from monde.models.mesh import loading_together
from monde.models.stored import checkpoint_files
from monde.weights.checkpoint import CheckpointError

_SETTINGS = frozenset(inspect.signature(MondeConfig).parameters) - {"quant_method"}
_OF_LOADING = frozenset({"dtype", "torch_dtype"})  # which configurations have, too
_NOT_OURS = frozenset({"quantization_config", "output_loading_info"})


def from_pretrained(path_or_id: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model whose experts monde runs; `model.monde` is the Engine.

    kwargs: those of MondeConfig, and those of transformers' from_pretrained (dtype, revision, token, settings of the
    model's configuration, ...).
    The class is the one that config.json names, e.g. Qwen3MoeForCausalLM; dtype defaults to the checkpoint's.

    Errors: CheckpointError for damaged or incomplete checkpoints; UnsupportedModelError; BudgetError, before
    any weight is read; ValueError for pre-quantised checkpoints; FileNotFoundError where neither a folder nor the
    hub has the model.
    """
    config = MondeConfig(**{name: kwargs.pop(name) for name in _SETTINGS & kwargs.keys()})
    with loading_together(config):
        _check_arguments(path_or_id, kwargs)
        return _from_pretrained(os.path.expanduser(path_or_id), config, kwargs)


def _from_pretrained(path_or_id: str, config: MondeConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    hub = {name: kwargs[name] for name in HUB_SETTINGS if name in kwargs}
    model_config = kwargs.pop("config", None)
    if model_config is None:
        model_config = read_configuration(path_or_id, **hub)
        _override(model_config, kwargs)
    checkpoint_files(path_or_id)  # before transformers, which has no words for a damaged index
    refuse_quantised(path_or_id, model_config)
    loaded: tuple[PreTrainedModel, Any] = model_class(model_config).from_pretrained(
        path_or_id, config=model_config, quantization_config=config, output_loading_info=True, **kwargs
    )
    model, info = loaded
    if info["missing_keys"]:  # transformers gives them random values and goes on
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{path_or_id}: the checkpoint has no tensor for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' * (len(missing) > 3)}; it is incomplete or of another model"
        )
    return model


def _override(model_config: Any, kwargs: dict[str, Any]) -> None:
    """Take settings of the model's configuration out of `kwargs`, as transformers does where it reads config.json."""
    for name in [name for name in kwargs if name not in _OF_LOADING and hasattr(model_config, name)]:
        setattr(model_config, name, kwargs.pop(name))


def _check_arguments(path_or_id: Any, kwargs: dict[str, Any]) -> None:
    """What transformers would report late, after asking the hub, or in another's name."""
    if not isinstance(path_or_id, str | Path):
        raise TypeError(f"from_pretrained: expected a folder or a hub id, got {path_or_id!r}")
    for given in _NOT_OURS & kwargs.keys():
        raise TypeError(
            f"from_pretrained: {given} is for transformers' from_pretrained; give monde's settings by name"
        )
    for given in kwargs.keys() - _SETTINGS:
        # device_map, which is transformers', is 0.75 like device.
        meant = difflib.get_close_matches(given, _SETTINGS, n=1, cutoff=0.8)
        if meant:
            raise TypeError(f"from_pretrained: unknown option {given}; did you mean {meant[0]}?")


def model_class(config: Any) -> Any:
    """The class that config.json names where transformers has it, else the auto class for text."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return (
        transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
