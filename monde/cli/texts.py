"""The tokens that a benchmark feeds: real text, because random tokens route unlike anything a user runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEED = 0


@dataclass(frozen=True)
class TokenSource:
    """A long row of token ids, and where they come from in words. Each of num_ranks ranks has windows of its own."""

    tokens_N: Tensor
    origin: str
    rank: int = 0
    num_ranks: int = 1

    @property
    def digest(self) -> str:
        """Of the ids: another text or another tokenizer has another."""
        return hashlib.sha256(self.tokens_N.numpy().tobytes()).hexdigest()[:16]

    def window(self, index: int, batch: int, length: int) -> Tensor:
        """Batch `index`: int64 [batch, length], sequences from far apart in the text; it wraps at the end."""
        index = index * self.num_ranks + self.rank
        num_tokens = self.tokens_N.numel()
        starts_B = (
            (torch.arange(batch) + batch * index) * 9973 * 7
        )  # 9973: prime, so that windows rarely meet
        positions = (starts_B[:, None] + torch.arange(length)[None, :]) % num_tokens
        return self.tokens_N[positions]


def token_source(
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    text_file: Path | None,
    random_tokens: bool,
    asked_by: str = "--text",
) -> TokenSource:
    """Text as the model's tokenizer reads it; random ids when asked for, or when there is no tokenizer.

    asked_by: the setting that names text_file.
    Errors: ValueError when the text cannot be read or has ids beyond the model's vocabulary.
    """
    if random_tokens or (tokenizer is None and text_file is None):
        why = "asked for" if random_tokens else "the model has no tokenizer"
        tokens_N = torch.randint(vocab_size, (1 << 17,), generator=torch.Generator().manual_seed(_SEED))
        return TokenSource(tokens_N, f"random tokens ({why})")
    if tokenizer is None:
        raise ValueError(
            "--text needs a tokenizer; put tokenizer.json next to config.json, or use --random-tokens"
        )
    text, origin = _read(text_file, asked_by)
    tokens_N = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if tokens_N.numel() < 2:
        raise ValueError(f"{asked_by} {text_file}: holds no text; give a file of a few pages")
    check_vocabulary(tokens_N, vocab_size, ", or use --random-tokens")
    return TokenSource(tokens_N, origin)


def check_vocabulary(tokens: Tensor, vocab_size: int, or_else: str = "") -> None:
    """Errors: ValueError for tokens that the model has no embedding for; or_else: another remedy."""
    if int(tokens.max()) >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {int(tokens.max())}, the model a vocabulary of {vocab_size}; "
            f"put the model's own tokenizer in its folder{or_else}"
        )


def _read(text_file: Path | None, asked_by: str) -> tuple[str, str]:
    if text_file is None:
        return (files("monde.cli") / "text" / "literature.txt").read_text(
            encoding="utf-8"
        ), "literature (shipped)"
    try:
        return text_file.read_text(encoding="utf-8"), text_file.name
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{asked_by} {text_file}: cannot be read as UTF-8 text ({error})") from error
