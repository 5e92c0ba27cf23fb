"""A model that is asked for more than its memory was planned for warns once, and names what to give."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import monde
from monde.models.decode_cache import KvRoom
from tests.monde import tiny
from tests.monde.eager_capture import with_graphs

GIB = 2**30


def planned(**settings: Any) -> Any:
    wanted = {"device": "cpu", "host_memory": GIB, "max_context": 16, "max_batch": 2} | settings
    return monde.offload(tiny.build("qwen3_moe"), **wanted)


def told(use: Callable[[], Any]) -> list[str]:
    """The warnings of `use` that are about the plan."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            use()
    return [str(w.message) for w in caught if "was planned for" in str(w.message)]


def message(asked: str, give: str) -> str:
    return (
        "host_memory was planned for max_context=16, max_batch=2 and may be exceeded: "
        f"{asked} positions are asked for; load the model with {give}"
    )


def generate(model: Any, batch: int, length: int, num_new: int, **settings: Any) -> Any:
    ids = tiny.prompt(batch, length)
    wanted = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "do_sample": False} | settings
    return model.generate(ids, max_new_tokens=num_new, **wanted)


def test_a_generation_within_the_plan_is_silent() -> None:
    model = planned()
    assert told(partial(generate, model, 2, 12, 4)) == []
    assert told(partial(generate, model, 1, 12, 20)) == []  # as many positions, in one sequence
    assert told(partial(model, tiny.prompt(8, 4))) == []


@pytest.mark.parametrize(
    ("batch", "length", "num_new", "settings", "asked", "give"),
    [
        (2, 12, 8, {}, "2 x 19", "max_context=19"),
        (3, 8, 5, {}, "3 x 12", "max_batch=3"),
        (3, 12, 8, {}, "3 x 19", "max_context=19, max_batch=3"),
        (1, 8, 5, {"num_beams": 3}, "3 x 12", "max_batch=3"),
        (1, 8, 5, {"do_sample": True, "num_return_sequences": 3}, "3 x 12", "max_batch=3"),
    ],
)
def test_a_generation_beyond_it_warns_once(
    batch: int, length: int, num_new: int, settings: dict[str, Any], asked: str, give: str
) -> None:
    model = planned()
    use = partial(generate, model, batch, length, num_new, **settings)
    assert told(use) == [message(asked, give)]
    assert told(use) == []
    assert told(partial(model, tiny.prompt(9, 9))) == []


@pytest.mark.parametrize("name", ["", "input_ids", "inputs_embeds"])
def test_a_prompt_beyond_it_warns_once_by_any_name(name: str) -> None:
    model, inputs = planned(), torch.zeros(3, 20, 32) if name == "inputs_embeds" else tiny.prompt(3, 20)
    use = partial(model, **{name: inputs}) if name else partial(model, inputs)
    assert told(use) == [message("3 x 20", "max_context=20, max_batch=3")]
    assert told(use) == []


def test_own_loops_are_seen_by_their_cache() -> None:
    model, cache = planned(), DynamicCache()
    for length, want in ((12, []), (4, []), (1, [message("2 x 17", "max_context=17")])):
        assert told(partial(model, tiny.prompt(2, length), past_key_values=cache)) == want
    model = planned()
    static = StaticCache(config=model.config, max_cache_len=40)
    step = partial(model, tiny.prompt(2, 4), past_key_values=static)
    assert told(step) == [message("2 x 40", "max_context=40")]


def test_without_a_budget_nothing_is_promised() -> None:
    model = planned(host_memory=None)
    assert told(partial(generate, model, 3, 30, 30)) == []
    assert not any("planned_size" in hook.__module__ for hook in model._forward_pre_hooks.values())


def test_copies_have_a_warning_of_their_own() -> None:
    model = planned()
    twin = copy.deepcopy(model)
    for one in (model, twin):
        assert len(told(partial(generate, one, 3, 12, 8))) == 1
        assert told(partial(one, tiny.prompt(9, 9))) == []


def test_recorded_steps_within_the_plan_are_silent() -> None:
    model = planned(max_context=256)
    size = model.monde.plan.size
    with_graphs(model, room=KvRoom(size.kv_bytes, size.kv_bytes_per_token))
    assert told(partial(generate, model, 2, 8, 24)) == []
    assert model._decode_runner.num_replays > 0
