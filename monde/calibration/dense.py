"""What a block costs beside its experts and its bytes: Python and launches where it runs eagerly, kernels in a graph;
and a decode step beside its blocks.

Models without experts, run the way the runtime runs models: with what it makes one launch of, on a static cache. Those that Python is timed
on are next to nothing; kernels in a graph have the dims of Qwen3-30B-A3B, and the bytes they read are taken off again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, StaticCache

from monde.calibration.graph import capture
from monde.calibration.samples import Probe, Samples, Timings, seconds_of
from monde.models.decode_cache import KvRoom, static_cache
from monde.models.decode_capture import CudaCapture
from monde.models.decode_graph import install, step_cache
from monde.models.decode_runner import CAPTURE_AFTER_STEPS
from monde.models.norms import fuse_norms
from monde.models.on_gpu import speed_up_on_gpu

_NUM_BLOCKS, _NUM_CAPTURED = 12, 6
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
        self._small, self._one_block = _model(_NUM_BLOCKS, device), _model(1, device)
        self._large = None
        if device.type == "cuda":
            self._large = _model(
                _NUM_CAPTURED, device, hidden_size=2048, num_attention_heads=32, head_dim=128
            )
            install(self._one_block, CudaCapture(device), KvRoom(1 << 24, 1))
        self._ids_11 = torch.zeros(1, 1, dtype=torch.long, device=device)

    def probes(self) -> list[Probe]:
        on_gpu = [Probe(_CAPTURED, self._captured)] if self._device.type == "cuda" else []
        return [Probe(_EAGER, self._eager), *on_gpu, Probe(_STEP, self._whole_step)]

    @staticmethod
    def eager_block_s(samples: dict[str, Samples]) -> float:
        return samples[_EAGER].median_s

    def captured_block_s(self, samples: dict[str, Samples], bytes_per_s: float) -> float:
        """Beside reading its weights at `bytes_per_s`."""
        assert self._large is not None
        embeddings = self._large.get_input_embeddings().weight  # of which a step reads a row
        num_read = sum(p.numel() for p in self._large.parameters()) - embeddings.numel()
        read_s = num_read * embeddings.dtype.itemsize / bytes_per_s
        return max(0.0, samples[_CAPTURED].median_s - float(read_s) / _NUM_CAPTURED)

    @staticmethod
    def step_s(samples: dict[str, Samples]) -> float:
        """Of a step beside its blocks, of which it has one."""
        block_s = samples[_CAPTURED if _CAPTURED in samples else _EAGER].median_s
        return max(0.0, samples[_STEP].median_s - block_s)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _eager(self) -> Timings:
        cache = static_cache(self._small.config, _NUM_POSITIONS)
        step = partial(self._step, self._small, cache)
        return {_EAGER: self._timed(step, cache, _NUM_BLOCKS)}

    def _captured(self) -> Timings:
        assert self._large is not None
        cache = static_cache(self._large.config, _NUM_POSITIONS)
        graph = capture(partial(self._step, self._large, cache))
        return {_CAPTURED: self._timed(graph.replay, cache, _NUM_CAPTURED)}

    @torch.no_grad()
    def _step(self, model: Any, cache: StaticCache) -> None:
        model(self._ids_11, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _timed(self, step: Callable[[], None], cache: StaticCache, num_blocks: int) -> list[float]:
        """Seconds of a block; every step is the first one of its cache."""

        def finished() -> None:
            step()
            self._wait()

        samples = []
        for _ in range(_NUM_SAMPLES + 2):
            cache.reset()
            self._wait()
            samples.append(seconds_of(finished) / num_blocks)
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


def _model(num_blocks: int, device: torch.device, **large: int) -> Any:
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
    dims |= large
    with torch.device(device):
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**dims))
    for layer in model.model.layers:
        layer.mlp.experts = _Nothing()
    model = model.to(torch.bfloat16).eval()
    fuse_norms(model)
    speed_up_on_gpu(model, device)
    return model
