"""`monde.offload`: hand the experts of a model that is already loaded to monde."""

from __future__ import annotations

import time
from typing import Any

from transformers import PreTrainedModel

from monde.config import MondeConfig
from monde.engine import Engine
from monde.executors.ranked_model import RankedModel
from monde.executors.ranks import RankGroup
from monde.models.deferral import check_deferral
from monde.models.experts import find_experts
from monde.models.fill import ProgressBar, fill_layer, load_report
from monde.models.hand_over import hand_over
from monde.models.memory import PeakMemory
from monde.models.mesh import check_same_weights, loading_together
from monde.models.sizing import plan_for, resolve_device


def offload(model: PreTrainedModel, config: MondeConfig | None = None, **settings: Any) -> PreTrainedModel:
    """Hand the experts of `model` to monde, in place, and return the model; `model.monde` is the Engine.

    settings are those of MondeConfig. Experts move layer by layer: no more than one layer exists twice.
    `state_dict` and `save_pretrained` give the original weights back exactly; a deep copy shares the experts.

    Errors: UnsupportedModelError for models without experts or of unknown families; BudgetError;
    ValueError for a model that is offloaded already, quantised, on the meta device or spread over devices by
    accelerate, and for NaN in weights. The model is unchanged after an error.
    """
    config = _config(config, settings)
    _check_offloadable(model)
    with loading_together(config) as ranks:
        return _offload(model, config, ranks)


def _offload(model: Any, config: MondeConfig, ranks: RankGroup | None) -> PreTrainedModel:
    start_s = time.perf_counter()
    modules = find_experts(model)
    device = resolve_device(config)
    check_deferral(model.config, modules, config)
    specs = [module.spec for module in modules]
    ranked = None if ranks is None else RankedModel(ranks, config, specs)
    plan = plan_for(model, modules, config, device, ranked)
    with PeakMemory() as peak:
        engine = Engine(config, specs if ranked is None else ranked.specs, plan, device, ranked)
        bar = ProgressBar(engine)
        try:
            for layer_idx, module in enumerate(modules):
                fill_layer(engine, layer_idx, module, module, bar)
                if ranks is None:
                    module.take_parameters()
            if ranks is not None:
                # A part does not give the whole back, so all ranks succeed before anything is taken.
                check_same_weights(model, engine)
                for module in modules:
                    module.take_parameters()
        except Exception:
            for layer_idx, module in enumerate(modules):
                if module.taken:
                    module.put_back(engine, layer_idx)
            engine.close()
            raise
        finally:
            bar.close()
        for layer_idx, module in enumerate(modules):
            module.attach(engine, layer_idx)
        model.to(device)
        model.eval()
        hand_over(model, engine, modules)
        engine.load_report = load_report(engine, time.perf_counter() - start_s, peak.stop())
    return model  # type: ignore[no-any-return]


def _config(config: MondeConfig | None, settings: dict[str, Any]) -> MondeConfig:
    if config is not None and settings:
        raise ValueError("offload: give either config= or single settings, not both")
    if config is None:
        return MondeConfig(**settings)
    if not isinstance(config, MondeConfig):
        raise TypeError(
            f"offload: expected a MondeConfig, got {type(config).__name__}; give its settings by name"
        )
    return config


def _check_offloadable(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"offload: expected a transformers model, got {type(model).__name__}")
    if isinstance(getattr(model, "monde", None), Engine):
        raise ValueError("offload: monde runs this model already; load it again to change its settings")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "offload: the model is quantised; load it in bf16, fp16 or fp32 without quantization_config"
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            'offload: accelerate spread this model over devices; load it with device_map="cpu" first'
        )
    if any(param.is_meta for param in model.parameters()):
        raise ValueError("offload: the model has no weights (meta device); use monde.from_pretrained instead")
