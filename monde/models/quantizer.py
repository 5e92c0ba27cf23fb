"""`from_pretrained(..., quantization_config=MondeConfig(...))`: experts bypass transformers' loading.

Registered as a quantizer because that is where transformers lets others in between building a model and
loading it. Nothing is quantised: once loaded, the model is a plain one with `model.monde`, exactly as after
`monde.offload`.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from monde.config import QUANT_METHOD, MondeConfig
from monde.engine import Engine
from monde.executors.ranked_model import RankedModel
from monde.executors.ranks import RankGroup
from monde.models.deferral import check_deferral
from monde.models.experts import ExpertsModule, find_experts
from monde.models.fill import ProgressBar, fill_layer, load_report
from monde.models.hand_over import hand_over
from monde.models.memory import PeakMemory
from monde.models.mesh import check_same_weights, loading_together
from monde.models.sizing import plan_for, resolve_device
from monde.models.sources import ModuleSource, find_sources
from monde.weights.checkpoint import Checkpoint, CheckpointError


@dataclass
class _Loading:
    """What is kept between the two halves of loading."""

    start_s: float
    peak: PeakMemory
    engine: Engine
    modules: list[ExpertsModule]
    sources: list[ModuleSource]
    checkpoint: Checkpoint
    shapes: dict[str, torch.Size]  # of the dense weights, as the configuration says


class MondeQuantizer(HfQuantizer):
    """Takes the experts out of the model before weights load and streams them into an Engine after."""

    requires_calibration = False
    quantization_config: MondeConfig
    _loading: _Loading | None = None

    def update_device_map(self, device_map: Any) -> Any:
        """Dense weights go where MondeConfig says.

        Errors: ValueError for a device_map that says otherwise.
        """
        wanted = resolve_device(self.quantization_config)
        if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            return {"": wanted}
        devices = {
            torch.device(d) if d != "disk" else d
            for d in (device_map.values() if isinstance(device_map, dict) else [device_map])
        }
        if devices != {wanted}:
            raise ValueError(
                f'device_map: monde puts dense weights on {wanted}; leave device_map out, or set device="..."'
            )
        return {"": wanted}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        with loading_together(self.quantization_config) as ranks:
            self._prepare(model, checkpoint_files, ranks)

    def _prepare(self, model: Any, checkpoint_files: Any, ranks: RankGroup | None) -> None:
        start_s, config = time.perf_counter(), self.quantization_config
        if checkpoint_files is None:
            raise ValueError(
                "monde loads experts from a checkpoint on disk; for a state_dict use monde.offload(model)"
            )
        modules = find_experts(model)
        device = resolve_device(config)
        check_deferral(model.config, modules, config)
        specs = [module.spec for module in modules]
        ranked = None if ranks is None else RankedModel(ranks, config, specs)
        plan = plan_for(model, modules, config, device, ranked)
        checkpoint = Checkpoint(checkpoint_files)
        sources = find_sources(model, modules, checkpoint)
        peak = PeakMemory()
        engine = Engine(config, specs if ranked is None else ranked.specs, plan, device, ranked)
        for module in modules:
            module.take_parameters()
            for submodule in module.module.modules():
                setattr(submodule, "_is_hf_initialized", True)  # noqa: B010 (nn.Module declares no such attribute)
        patterns = {re.escape(name) for module in modules for name in module.all_full_names()}
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(re.sub(r"\d+", r"\\d+", pattern) + "$" for pattern in patterns),
        }
        shapes = {name: param.shape for name, param in model.named_parameters()}
        self._loading = _Loading(start_s, peak, engine, modules, sources, checkpoint, shapes)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        loading, self._loading = self._loading, None
        assert loading is not None
        ranked = loading.engine.ranked
        with ranked.ranks.together() if ranked is not None else contextlib.nullcontext():
            self._finish(model, loading)
        return model

    def _finish(self, model: Any, loading: _Loading) -> None:
        engine, bar = loading.engine, ProgressBar(loading.engine)
        with loading.peak:
            _check_shapes(model, loading.shapes)
            with loading.checkpoint:
                for layer_idx, module in enumerate(loading.modules):
                    fill_layer(engine, layer_idx, module, loading.sources[layer_idx], bar)
                    loading.checkpoint.drop_pages()
                    module.attach(engine, layer_idx)
            bar.close()
            check_same_weights(model, engine)
            hand_over(model, engine, loading.modules)
            seconds_s = time.perf_counter() - loading.start_s
            peak_bytes = max(loading.peak.stop(), _held_bytes(model, engine))
            engine.load_report = load_report(engine, seconds_s, peak_bytes)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                module.config._is_quantized = False

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _check_shapes(model: Any, shapes: dict[str, torch.Size]) -> None:
    """transformers leaves them to quantizers. Errors: CheckpointError for a dense weight of another shape."""
    for name, param in model.named_parameters():
        if param.shape != shapes.get(name, param.shape):
            raise CheckpointError(
                f"{name}: expected shape {list(shapes[name])} as config.json says, the checkpoint has "
                f"{list(param.shape)}; use the config and all files of one model"
            )


def _held_bytes(model: Any, engine: Engine) -> int:
    """Host memory of the loaded model. Dense weights may be pages of the checkpoint that nobody has read yet: they
    come with the first step, so what loading has touched can be less.
    """
    dense = (t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu")
    dense_bytes: int = sum(t.nbytes for t in dense)
    return dense_bytes + sum(layer.host.bank.resident_bytes for layer in engine.layers)


def register() -> None:
    """Make transformers know MondeConfig. Idempotent."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(MondeConfig)
        register_quantizer(QUANT_METHOD)(MondeQuantizer)
