"""What a block costs beside its experts and its bytes: Python and launches where it runs eagerly, kernels in a graph;
and a decode step beside its blocks.

Models of next to nothing, without experts, run the way the runtime runs models: norms fused, on a static cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from monde.calibration.graph import capture
from monde.calibration.samples import Probe, Samples, Timings, seconds_of
from monde.models.decode_cache import KvRoom, static_cache
from monde.models.decode_capture import CudaCapture
from monde.models.decode_graph import install, step_cache
from monde.models.decode_runner import CAPTURE_AFTER_STEPS
from monde.models.norms import fuse_norms

_NUM_BLOCKS = 12
_NUM_POSITIONS = 256
_NUM_SAMPLES = 30
_EAGER, _CAPTURED = "eager block without experts", "captured block without experts"
_STEP = "decode step of one block"
_WARM_UP_STEPS = CAPTURE_AFTER_STEPS + 8  # those that are counted before it is captured, and some more


class _Nothing(nn.Module):
    """Stands where experts were; not even a kernel runs."""

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        return x_TD


class DenseProbes:
    """Steps of one token; `captured` ones need CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._model, self._one_block = _model(_NUM_BLOCKS, device), _model(1, device)
        if device.type == "cuda":
            install(self._one_block, CudaCapture(device), KvRoom(1 << 24, 1))
        self._cache = static_cache(self._model.config, _NUM_POSITIONS)
        self._ids_11 = torch.zeros(1, 1, dtype=torch.long, device=device)

    def probes(self) -> list[Probe]:
        on_gpu = [Probe(_CAPTURED, self._captured)] if self._device.type == "cuda" else []
        return [Probe(_EAGER, self._eager), *on_gpu, Probe(_STEP, self._whole_step)]

    @staticmethod
    def eager_block_s(samples: dict[str, Samples]) -> float:
        return samples[_EAGER].median_s

    @staticmethod
    def captured_block_s(samples: dict[str, Samples]) -> float:
        return samples[_CAPTURED].median_s

    @staticmethod
    def step_s(samples: dict[str, Samples]) -> float:
        """Of a step beside its blocks."""
        block_s = samples[_CAPTURED if _CAPTURED in samples else _EAGER].median_s
        return max(0.0, samples[_STEP].median_s - block_s)

    @torch.no_grad()
    def _step(self) -> None:
        self._model(self._ids_11, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _eager(self) -> Timings:
        def step() -> None:
            self._step()
            self._wait()

        return {_EAGER: self._timed(step)}

    def _captured(self) -> Timings:
        graph = capture(self._step)

        def step() -> None:
            graph.replay()
            self._wait()

        return {_CAPTURED: self._timed(step)}

    def _timed(self, step: Callable[[], None]) -> list[float]:
        """Seconds of a block; every step is the first one of its cache."""
        samples = []
        for _ in range(_NUM_SAMPLES + 2):
            self._cache.reset()
            self._wait()
            samples.append(seconds_of(step) / _NUM_BLOCKS)
        return samples[2:]  # the first ones allocate and fill caches of code

    @torch.inference_mode()
    def _whole_step(self) -> Timings:
        """As a sampler takes it: recognised, replayed where it can be, the token chosen and brought to the host."""
        with step_cache(self._one_block, 1, _NUM_POSITIONS) as pooled:
            cache = pooled or static_cache(self._one_block.config, _NUM_POSITIONS)

            def step() -> None:
                output = self._one_block(
                    self._ids_11, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                output.logits[:, -1].argmax(-1).tolist()

            samples = [seconds_of(step) for _ in range(_WARM_UP_STEPS + _NUM_SAMPLES)]
        return {_STEP: samples[_WARM_UP_STEPS:]}


def _model(num_blocks: int, device: torch.device) -> Any:
    dims: dict[str, Any] = dict(
        vocab_size=8192,
        hidden_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=num_blocks,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=4,
    )
    with torch.device(device):
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**dims))
    for layer in model.model.layers:
        layer.mlp.experts = _Nothing()
    model = model.to(torch.bfloat16).eval()
    fuse_norms(model)
    return model
