"""An encoder-decoder's two halves as forecasts see them: a prompt is the encoder's work, a step the decoder's.

The prompt's pass also makes the keys and values of every cross-attention; a step reads those and its own. Steps of
encoder-decoders are launched by Python, and a block with a cross-attention has about the launches of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from monde.models.experts import ExpertsModule
from monde.models.sizing import decoder_layers_of, encoder_layers_of
from monde.planning.forecast import ModelOutline

_CROSS_ATTENTIONS = ("EncDecAttention", "cross_attention")
_KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj")


@dataclass(frozen=True)
class Halves:
    """encoder_ids, decoder_ids: which of the model's layers with experts each half has."""

    encoder: ModelOutline
    decoder: ModelOutline
    encoder_ids: tuple[int, ...]
    decoder_ids: tuple[int, ...]


def halves_of(model: Any, modules: Sequence[ExpertsModule], whole: ModelOutline) -> Halves:
    """Errors: ValueError for a model whose halves cannot be told apart."""
    config = model.config
    num_encoder, num_decoder = encoder_layers_of(config), decoder_layers_of(config)
    paths = {id(module): path for path, module in model.named_modules()}
    encoder_path, decoder_path = (paths.get(id(half)) for half in (model.get_encoder(), model.get_decoder()))
    if not (num_encoder and num_decoder and encoder_path and decoder_path):
        raise ValueError(
            f"plan: where the encoder of {config.model_type} ends and its decoder begins is not known; load it to see "
            "its memory plan, model.monde.plan.explain()"
        )
    experts = {module.full_name(param) for module in modules for param in module.param_names()}
    sizes = {name: p.nbytes for name, p in model.named_parameters() if name not in experts}
    embeddings = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Embedding)}

    def dense_bytes(half: str) -> int:
        return sum(n for name, n in sizes.items() if name.startswith(f"{half}.") and name not in embeddings)

    def layer_ids(half: str) -> tuple[int, ...]:
        return tuple(i for i, module in enumerate(modules) if module.name.startswith(f"{half}."))

    cross_bytes = sum(n for name, n in sizes.items() if _is_cross_key_or_value(name))
    encoder_ids, decoder_ids = layer_ids(encoder_path), layer_ids(decoder_path)
    encoder = replace(
        whole,
        layers=tuple(whole.layers[i] for i in encoder_ids),
        num_blocks=num_encoder,
        dense_read_bytes=dense_bytes(encoder_path) + cross_bytes,
        attention_dim=2 * whole.attention_dim,  # nothing is in the future, nothing is skipped
    )
    decoder = replace(
        whole,
        layers=tuple(whole.layers[i] for i in decoder_ids),
        num_blocks=2 * num_decoder,
        dense_read_bytes=dense_bytes(decoder_path)
        - cross_bytes
        + model.get_output_embeddings().weight.nbytes,
        # Of itself and of the encoder: half of what the memory plan counts for a token of both.
        kv_bytes_per_token=whole.kv_bytes_per_token // 2,
        is_captured=False,
    )
    return Halves(encoder, decoder, encoder_ids, decoder_ids)


def _is_cross_key_or_value(name: str) -> bool:
    parts = name.split(".")
    return any(part in _CROSS_ATTENTIONS and after in _KEYS_AND_VALUES for part, after in pairwise(parts))
