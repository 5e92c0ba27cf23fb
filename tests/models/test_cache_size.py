"""What the memory plan holds free for a model's cache, next to what transformers puts into it."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch

import monde
from monde.models.cache_size import cache_size
from monde.models.experts import find_experts
from monde.models.sizing import model_size
from tests.models.animals import Animal
from tests.models.zoo import EVERY_ANIMAL, NUM_TOKENS, build, example_inputs

# Their forward needs numbers: indexers look for nonzeros. They are planned with full attention in every layer.
NOT_TRIED = ("glm5_next", "qwen4_exp")


@pytest.mark.parametrize("animal", EVERY_ANIMAL)
@torch.no_grad()
def test_the_plan_has_room_for_the_cache_and_no_more(animal: Animal) -> None:
    if animal.kind != "decoder":
        pytest.skip("keeps no cache from a plain call")
    model, inputs = build(animal), example_inputs(animal)
    batch = inputs["input_ids"].shape[0]
    held_bytes = tensor_bytes(model(**inputs, use_cache=True).past_key_values)
    modules, config = find_experts(model), monde.MondeConfig(max_context=NUM_TOKENS, max_batch=batch)
    size = model_size(model, modules, config, on_gpu=False)
    if animal.family in NOT_TRIED:
        assert cache_size(model, modules) is None
        assert held_bytes <= 1.5 * size.kv_bytes  # at these sizes; states are small next to real contexts
    else:
        scalars_bytes = 64  # counters, one a layer and not one a sequence
        assert held_bytes <= size.kv_bytes <= held_bytes + batch * scalars_bytes
    assert all(not p.is_meta for p in model.parameters())


def tensor_bytes(cache: Any) -> int:
    """Of all distinct tensors that pickling would see."""
    found: dict[int, int] = {}

    class Reducer(pickle.Pickler):
        def reducer_override(self, part: Any) -> Any:
            if isinstance(part, torch.Tensor):
                found[id(part)] = part.nbytes
                return int, ()
            return NotImplemented

    Reducer(io.BytesIO()).dump(cache)
    return sum(found.values())
