"""Shared experts on a second stream of a real GPU. That answers stay the same, test_families.py shows for each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import monde
from tests.models.animals import Animal
from tests.models.zoo import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

QWEN = Animal("qwen2_moe", "Qwen2MoeForCausalLM")
DEEPSEEK = Animal("glm4_moe", "Glm4MoeForCausalLM", dict(n_group=1, topk_group=1, first_k_dense_replace=0))


def streams_of_shared(model: Any) -> set[int]:
    """Addresses of the streams that shared experts run on are added to the set, call by call."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if name.endswith("down_proj") and "shared" in name:
            module.register_forward_pre_hook(lambda *_: seen.add(torch.cuda.current_stream().cuda_stream))
    return seen


@pytest.mark.parametrize("animal", [QWEN, DEEPSEEK], ids=lambda animal: animal.family)
@torch.no_grad()
def test_decode_runs_them_on_a_second_stream_and_prompts_do_not(animal: Animal) -> None:
    model = monde.offload(build(animal), max_context=128)
    seen = streams_of_shared(model)
    caller = torch.cuda.current_stream().cuda_stream
    model(torch.randint(3, 90, (1, 80), device="cuda"))
    assert seen == {caller}
    seen.clear()
    model(torch.randint(3, 90, (1, 3), device="cuda"))
    assert len(seen) == 1
    assert caller not in seen
    model.monde.close()


@pytest.mark.parametrize("animal", [QWEN, DEEPSEEK], ids=lambda animal: animal.family)
@torch.no_grad()
def test_graphs_and_callers_on_two_streams(animal: Animal) -> None:
    """Replays and eager calls take turns on streams of their own; each gives what the first gave."""
    model = monde.offload(build(animal), max_context=64, gpu_memory="1GiB")
    ids = torch.randint(3, 90, (2, 5), device="cuda")
    settings: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    wanted, wanted_logits = model.generate(ids, **settings), model(ids).logits
    streams = [torch.cuda.Stream() for _ in range(2)]
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            streams[i % 2].wait_stream(streams[(i + 1) % 2])
            logits = model(ids).logits
            got = model.generate(ids, **settings)
        streams[i % 2].synchronize()
        torch.testing.assert_close(logits, wanted_logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(got, wanted)
    model.monde.close()
