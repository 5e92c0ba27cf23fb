"""Rotary embeddings and routers as one operation: which families have them, and that they answer as before.

The kernels' twins here are torch's own operations; tests/gpu/test_step_kernels.py compares kernels and twins.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from monde.models import rotary, routers
from tests.models.animals import Animal
from tests.models.zoo import EVERY_ANIMAL, build, example_inputs

# Whose attention turns whole heads by halves, and whose routers are a softmax and its largest in the model's type.
ROTARY = (
    "afmoe aria axk1 dbrx deepseek_ocr2 deepseek_v3 dots1 exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe granitemoe "
    "granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 jetmoe laguna lfm2_moe mellum "
    "mimo_v2_flash minimax minimax_m2 minimax_m3_vl mistral4 mixtral olmoe phimoe qwen2_moe qwen3_5_moe qwen3_moe "
    "qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp solar_open step3p7 zaya "
    "beam flint kolibri1 mistral_large4 muse_spark unlimited_ocr"
)
ROUTERS = (
    "cohere2_moe flex_olmo mellum minimax mistral4 mixtral olmoe qwen2_moe "
    "qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp"
)
if Version(transformers.__version__) >= Version("5.23"):
    ROUTERS += " aria jamba"  # have routers of their own there


def can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """What the kernel asks for, but for the GPU."""
    return q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] == k.shape[-1]


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotary._turned(q, cos, sin), rotary._turned(k, cos, sin)


def choose(logits: Tensor, num_topk: int, normalises: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scores, ids = torch.softmax(logits, -1, dtype=torch.float32).topk(num_topk)
    return (scores / scores.sum(-1, keepdim=True) if normalises else scores).to(dtype), ids


@pytest.mark.parametrize("animal", EVERY_ANIMAL)
@torch.no_grad()
def test_every_family_answers_the_same(animal: Animal, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    model, inputs = build(animal), example_inputs(animal)
    wanted = model(**inputs).logits
    for module, name, twin in (
        (rotary, "can_rotate", can_rotate),
        (rotary, "rotate", rotate),
        (routers, "can_choose", lambda *_: True),
        (routers, "choose", choose),
    ):

        def told(*args: Any, name: str = name, twin: Any = twin) -> Any:
            called.append(name)
            return twin(*args)

        monkeypatch.setattr(module, name, told)
    num_rotary, num_routers = rotary.fuse_rotary(model), routers.fuse_routers(model)
    assert bool(num_rotary) == (animal.family in ROTARY.split())
    assert bool(num_routers) == (animal.family in ROUTERS.split())
    torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
    assert ("choose" in called) == bool(num_routers)
    assert rotary.fuse_rotary(model) == routers.fuse_routers(model) == 0, "twice"
