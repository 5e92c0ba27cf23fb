"""monde's name in transformers' registries of experts implementations.

monde attaches to modules, not to a name: asking for the name alone gets an error that says what to do.
"""

from __future__ import annotations

from typing import Any, NoReturn

from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ExpertsInterface

NAME = "monde"


def _not_attached(module: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f'{type(module).__name__}: experts_implementation="{NAME}" was set on a model that monde does not '
        "run; load it with monde.from_pretrained(...) or call monde.offload(model)"
    )


def _no_fp8(module: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "monde does not run FP8 experts yet; load a bf16, fp16 or fp32 checkpoint of the model"
    )


def register() -> None:
    """Idempotent."""
    ExpertsInterface.register(NAME, _not_attached)
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, _no_fp8)
