"""Several threads call one model at once: each gets its own answer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import monde
from tests.monde import tiny
from tests.monde.test_residency import restless

NUM_THREADS, NUM_CALLS = 4, 6
IDS = [tiny.prompt(1, 5 + 3 * i) for i in range(NUM_THREADS)]
SETTINGS: dict[str, dict[str, Any]] = {
    "all-on-the-host": {},
    "slots": {"gpu_memory": "40KB", "residency": "static"},
    "deferred": {"gpu_memory": "40KB", "residency": "static", "deferred_experts": 1},
}


def at_once(call: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    """By thread, what `call` gives for that thread's prompt, time after time."""

    def often(ids: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [call(ids) for _ in range(NUM_CALLS)]

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(often, IDS, timeout=120))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_text_and_logits(settings: dict[str, Any]) -> None:
    model = monde.offload(tiny.build("qwen3_moe"), device="cpu", **settings)
    for call in (lambda ids: model(ids).logits, lambda ids: tiny.greedy(model, ids)):
        with torch.no_grad():
            want = [call(ids) for ids in IDS]
        for wanted, got in zip(want, at_once(call), strict=True):
            assert all(torch.equal(wanted, tensor) for tensor in got)


def test_logits_while_residents_move() -> None:
    pytest.importorskip("hostcompute._native")
    original = tiny.build("qwen3_moe")
    model = restless(original)
    want = [tiny.expected(original, ids) for ids in IDS]
    for wanted, got in zip(want, at_once(lambda ids: model(ids).logits), strict=True):
        for logits in got:
            tiny.assert_logits(logits, wanted)
    assert model.monde.counters().num_swaps > 0
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.state_dict().items())
