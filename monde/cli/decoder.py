"""A sequence under way: what a benchmark feeds a model, token by token, with the likeliest next token of each.

Decoders read a prompt into their cache. Encoder-decoders read it with the encoder, after which the decoder takes its
start token; what they are fed step by step is the decoder's. Letters: B sequences, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Decoder:
    """The model and its cache."""

    least_depth = 0  # tokens that must have been read before the first step

    def __init__(self, model: Any, cache: Any = None) -> None:
        self._model = model
        self._cache = cache

    def read(self, tokens_BT: Tensor) -> list[int]:
        """Feed a prompt; the likeliest next token of each sequence, on the host."""
        return self._forward(input_ids=tokens_BT, logits_to_keep=1)

    def step(self, tokens_B1: Tensor) -> list[int]:
        """Feed one token more of each sequence; as read."""
        return self.read(tokens_B1)

    def _forward(self, **inputs: Any) -> list[int]:
        output = self._model(past_key_values=self._cache, use_cache=True, **inputs)
        self._cache = output.past_key_values
        chosen: list[int] = output.logits[:, -1].argmax(-1).tolist()
        return chosen


class EncoderDecoder(Decoder):
    """A model of two halves. A prompt is read once, as a whole."""

    least_depth = 1
    _encoded: Any = None

    def read(self, tokens_BT: Tensor) -> list[int]:
        assert self._encoded is None, "an encoder reads one prompt"
        self._encoded = self._model.get_encoder()(tokens_BT)
        start = start_token(self._model)
        return self.step(torch.full_like(tokens_BT[:, :1], start))

    def step(self, tokens_B1: Tensor) -> list[int]:
        return self._forward(encoder_outputs=self._encoded, decoder_input_ids=tokens_B1)


def decoder_of(model: Any, cache: Any = None) -> Decoder:
    return EncoderDecoder(model, cache) if model.config.is_encoder_decoder else Decoder(model, cache)


def choices_without_cache(model: Any, tokens_1T: Tensor) -> list[int]:
    """The likeliest token after each of a prompt's, in one pass; encoder-decoders get it in both halves."""
    inputs = {"decoder_input_ids": tokens_1T} if model.config.is_encoder_decoder else {}
    chosen: list[int] = model(tokens_1T, use_cache=False, **inputs).logits[0].argmax(-1).tolist()
    return chosen


def start_token(model: Any) -> int:
    """What an answer begins with, as generate has it. Errors: ValueError where the model does not say."""
    generation = model.generation_config
    for token_id in (generation.decoder_start_token_id, generation.bos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        f"{model.config.model_type}: nothing says what an answer begins with; set decoder_start_token_id in its "
        "generation_config.json"
    )
