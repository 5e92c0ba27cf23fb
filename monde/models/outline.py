"""A model's sizes from its configuration and, where they are here, the headers of its checkpoint. No weights needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hostcompute import ExpertSpec
from monde.config import MondeConfig
from monde.executors.decode import MAX_DECODE_TOKENS
from monde.executors.prefill_size import NUM_BUFFERS, LayerPieces, PrefillSize
from monde.executors.zero_copy import can_read_from_host
from monde.models.configuration import read_configuration, refuse_quantised
from monde.models.experts import find_experts
from monde.models.gpu_attention import kv_passes
from monde.models.halves import Halves, halves_of
from monde.models.loading import model_class
from monde.models.sizing import TOPK_NAMES, attended_values, heads_of, model_size, shape_of, topk_of
from monde.models.stored import (
    Index,
    StoredSizes,
    checkpoint_files,
    checkpoint_index,
    stored_dtype,
    stored_sizes,
)
from monde.planning.budget import ModelSize
from monde.planning.forecast import ModelOutline, MoeLayer
from monde.routing.heat import Heat
from monde.weights.checkpoint import CheckpointError
from monde.weights.packing import TORCH_DTYPES

# Layers that go over no keys and values, as transformers calls them.
_WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "moe", "mlp"})


@dataclass(frozen=True)
class Outlined:
    """What the memory plan needs, what the forecast needs, and what the checkpoint holds, None without one.

    index: where the checkpoint's files are not here, but what names their tensors is. halves: of encoder-decoders.
    """

    size: ModelSize
    outline: ModelOutline
    stored: StoredSizes | None
    index: Index | None
    stored_dtype: (
        torch.dtype
    )  # config.json's, else the checkpoint's, else its index's by bytes a weight, else bf16
    halves: Halves | None = None


def outline_of(
    path_or_id: str,
    max_context: int,
    max_batch: int,
    heat: Heat | None = None,
    on_gpu: bool = True,
    dtype: torch.dtype | None = None,
) -> Outlined:
    """Build the model that config.json describes on the meta device and read off its shapes.

    Sizes are those in memory, in `dtype`, by default the type that loading gives: config.json's, else the
    checkpoint's, else what its index's bytes say. Experts are as popular as `heat` says, else equally. on_gpu: whether dense weights will run there.
    Errors: those of read_configuration and refuse_quantised; CheckpointError for files or an index that are damaged or
    of another model;
    UnsupportedModelError; ValueError for heat of another model, halves that cannot be told apart, and when the configuration does not
    say how many experts a token takes.
    """
    config = read_configuration(path_or_id)
    refuse_quantised(path_or_id, config)
    cls = model_class(config)
    # An auto class, of configurations without architectures, has the public method only.
    from_config = getattr(cls, "_from_config", None) or cls.from_config
    files = checkpoint_files(path_or_id)
    index = None if files else checkpoint_index(path_or_id)
    stored = getattr(config, "dtype", None) or stored_dtype(files)
    if stored is None and index is not None:
        model = _described(path_or_id, from_config, config, torch.bfloat16)
        stored = index.dtype(sum(p.numel() for p in model.parameters()))
    stored = stored or torch.bfloat16
    dtype = dtype or stored
    model = _described(path_or_id, from_config, config, dtype)
    modules = find_experts(model)
    if index is not None:
        index.check(model, modules)
    size = model_size(model, modules, MondeConfig(max_context=max_context, max_batch=max_batch), on_gpu)
    text_config: Any = config.get_text_config()
    num_topk = _num_topk(text_config, config)
    num_experts_L = [module.spec.num_experts for module in modules]
    if heat is not None:
        heat.check(path_or_id, num_experts_L)
    counts: Sequence[NDArray[np.floating]] = (
        [np.ones(n) for n in num_experts_L] if heat is None else heat.count_L
    )
    layers = tuple(
        MoeLayer(
            shape_of(module.spec),
            num_topk,
            _normalised(count_E),
            zero_copy=can_read_from_host(module.spec, dtype),
            num_ahead=_num_ahead(module.spec),
            staging=LayerPieces.of(module.spec).staging,
        )
        for module, count_E in zip(modules, counts, strict=True)
    )
    # Of the input embedding a step reads a row per token, unless the output head is the same matrix.
    embedding = model.get_input_embeddings().weight
    tied = bool(getattr(text_config, "tie_word_embeddings", False))
    heads = heads_of(text_config)
    outline = ModelOutline(
        layers=layers,
        num_blocks=max(int(getattr(text_config, "num_hidden_layers", 0)), len(layers)),
        dense_read_bytes=size.dense_bytes - (0 if tied else embedding.nbytes),
        dense_bytes_per_weight=embedding.element_size(),
        kv_bytes_per_token=attended_values(text_config, _WITHOUT_ATTENTION) * dtype.itemsize,
        kv_passes=kv_passes(model, heads.num_repeats),
        attention_dim=heads.num_heads * heads.head_dim,
        decode_tokens=MAX_DECODE_TOKENS,
        chunk_tokens=PrefillSize.of(
            [module.spec for module in modules], dtype.itemsize, size.num_tokens, num_topk
        ).chunk_tokens(num_topk),
    )
    halves = halves_of(model, modules, outline) if config.is_encoder_decoder else None
    return Outlined(
        size, outline, stored_sizes(model, modules, files) if files else None, index, stored, halves
    )


def _described(path_or_id: str, from_config: Callable[..., Any], config: Any, dtype: torch.dtype) -> Any:
    """Errors: ValueError for a type that models are not run in; CheckpointError for sizes that make no model."""
    if dtype not in TORCH_DTYPES.values():
        raise ValueError(
            f"{path_or_id}: its config.json says {dtype}; monde runs bf16, fp16 and fp32: give such a checkpoint"
        )
    try:
        with torch.device("meta"):
            return from_config(config, dtype=dtype)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{path_or_id}: its config.json describes no model ({str(error) or type(error).__name__}); correct it"
        ) from error


def _normalised(count_E: NDArray[np.floating]) -> NDArray[np.float64]:
    """Shares that sum to 1; equal ones for a layer that saw no tokens."""
    total = float(count_E.sum())
    return np.asarray(count_E / total if total > 0 else np.full(len(count_E), 1 / len(count_E)), np.float64)


def _num_ahead(spec: ExpertSpec) -> int:
    """Experts that fill all staging buffers; those that travel in pieces are not fetched ahead."""
    pieces = LayerPieces.of(spec)
    return NUM_BUFFERS * pieces.num_staged if pieces.piece_rows >= spec.d_ffn else 0


def _num_topk(*configs: Any) -> int:
    """Experts per token."""
    num_topk = topk_of(*configs)
    if num_topk is None:
        raise ValueError(
            f"plan: the configuration of {getattr(configs[-1], 'model_type', 'this model')} does not say how many "
            f"experts a token takes; expected one of {', '.join(TOPK_NAMES)}"
        )
    return num_topk
