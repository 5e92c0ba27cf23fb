"""How long a sequence a model was made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def positions_of(config: Any) -> int | None:
    """The longest sequence, in tokens, that the configuration speaks for; None where it sets no limit.

    Rotary embeddings that are stretched reach further than what max_position_embeddings may still say: to the length
    that they were trained on times their factor. Several kinds of them in one model: as far as the furthest.
    """
    text_config = config.get_text_config()
    num_positions = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(num_positions, int) or num_positions < 1:
        return None
    return max(num_positions, *(int(length) for length in _stretched(text_config, num_positions)), 0)


def _stretched(text_config: Any, num_positions: int) -> Iterator[float]:
    rope = getattr(text_config, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):  # one for all layers, or one by kind of layer
        factor = kind.get("factor") if isinstance(kind, Mapping) else None
        if isinstance(factor, int | float):
            yield (kind.get("original_max_position_embeddings") or num_positions) * factor
