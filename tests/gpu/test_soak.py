"""Thousands of decode steps: residents that never rest, batches of any size, generations that end in the middle.

SOAK_STEPS says how many (default 600, a quarter of a minute; `make gpu-soak` makes 10,000). Two models in one process
take turns; the one whose experts all stay on the host is the other one's oracle.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import threading
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import monde
from tests.gpu.test_residency import come_to_rest
from tests.monde import tiny
from tests.monde.cancelling import CancelAfter, Cancelled
from tests.monde.test_residency import RESTLESS, assert_consistent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("hostcompute._native")

NUM_STEPS = int(os.environ.get("SOAK_STEPS", "600"))
CONTEXT, MAX_BATCH = 256, 8
BATCHES = (1, 1, 1, 2, 2, 3, 5, 8)  # small ones more often, as their caches stay in the pool together
SHARE_CANCELLED = 0.15
MIB = 2**20
# fp32 rounds by 2^-24; a step chains fewer than 2^12 additions, most of whose errors cancel. An expert read while it
# is overwritten, or another one's, moves logits by a share of their own size.
LOGITS_TOLERANCE = 2.0**-24 * 2**10
ALLOWED_GPU_BYTES, ALLOWED_RESERVED_BYTES, ALLOWED_HOST_BYTES = 8 * MIB, 128 * MIB, 64 * MIB


@dataclass(frozen=True)
class Held:
    """What the process holds when nothing runs."""

    gpu_bytes: int
    reserved_bytes: int
    host_bytes: int
    num_threads: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        process = psutil.Process()
        sizes = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), process.memory_info().rss)
        return cls(*sizes, threading.active_count())

    def check_growth(self, before: Held, when: str) -> None:
        assert self.gpu_bytes - before.gpu_bytes <= ALLOWED_GPU_BYTES, (when, before, self)
        assert self.reserved_bytes - before.reserved_bytes <= ALLOWED_RESERVED_BYTES, (when, before, self)
        assert self.host_bytes - before.host_bytes <= ALLOWED_HOST_BYTES, (when, before, self)
        assert self.num_threads <= before.num_threads, (when, before, self)


def offloaded(original: Any, share: float, num_spares: int | None = None) -> Any:
    """num_spares: host memory has so many places for residents that leave, and no copies of residents."""
    sizes: dict[str, Any] = {"max_context": CONTEXT, "max_batch": MAX_BATCH}
    plan = monde.offload(copy.deepcopy(original), residency="static", **sizes).monde.plan
    budget_bytes = int(plan.gpu_used_bytes - plan.slots_bytes + share * plan.size.all_slots_bytes)
    if num_spares is not None:
        tight = monde.offload(copy.deepcopy(original), residency="static", gpu_memory=budget_bytes, **sizes)
        plan, layer = tight.monde.plan, tight.monde.plan.size.layers[0]
        kept_bytes = sum(plan.num_resident_L) * layer.kept_bytes
        sizes["host_memory"] = int(plan.host_used_bytes + kept_bytes + num_spares * layer.expert_bytes)
    return monde.offload(copy.deepcopy(original), residency="dynamic", gpu_memory=budget_bytes, **sizes)


def generate(model: Any, ids: Tensor, num_new: int, **settings: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )


def assert_same(got: Any, want: Any, what: str) -> None:
    """Logits agree while the texts do; where they part, the two best tokens were equal within rounding."""
    num_prompt = want.sequences.shape[1] - len(want.logits)
    alike_B = torch.ones(want.sequences.shape[0], dtype=torch.bool, device=want.sequences.device)
    for step, (mine_BV, theirs_BV) in enumerate(zip(got.logits, want.logits, strict=True)):
        error_B = (mine_BV - theirs_BV).abs().amax(-1)
        allowed_B = LOGITS_TOLERANCE * theirs_BV.abs().amax(-1)
        wrong_B = alike_B & ~(error_B <= allowed_B)
        assert not wrong_B.any(), f"{what}, step {step}: {error_B[wrong_B]} off, {allowed_B[wrong_B]} allowed"
        alike_B &= got.sequences[:, num_prompt + step] == want.sequences[:, num_prompt + step]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("num_spares", [None, 2], ids=["copies", "exchanges"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])  # gpt_oss has biases
def test_soak(name: str, num_spares: int | None) -> None:
    rng, original = random.Random(0), tiny.build(name)
    model, oracle = offloaded(original, share=0.5, num_spares=num_spares), offloaded(original, share=0)
    assert model.monde.plan.releases == (num_spares is not None)
    residency = model.monde.residency
    residency.settings, residency.swap_share, residency.tracker.keep_per_step = RESTLESS, 1e9, 0.01
    num_steps = num_cancelled = 0
    held: Held | None = None
    while num_steps < NUM_STEPS:
        batch, length, num_new = rng.choice(BATCHES), rng.randint(2, 30), rng.randint(4, 60)
        generator = torch.Generator().manual_seed(num_steps)
        ids = torch.randint(3, tiny.VOCABULARY, (batch, length), generator=generator).cuda()
        if rng.random() < SHARE_CANCELLED:
            num_asked = rng.randint(0, num_new - 2)
            with pytest.raises(Cancelled):
                generate(model, ids, num_new, stopping_criteria=[CancelAfter(num_asked)])
            num_cancelled += 1
        else:
            got = generate(model, ids, num_new)
            assert_same(got, generate(oracle, ids, num_new), f"{name} at step {num_steps}, batch {batch}")
            del got
        num_steps += num_new
        if held is None and num_steps > NUM_STEPS // 3:
            held = Held.now()
    assert held is not None
    Held.now().check_growth(held, f"after {num_steps} steps")
    counters = model.monde.counters()
    assert num_cancelled > 0
    assert counters.num_swaps > num_steps // (20 if num_spares is None else 40)
    assert 0 < counters.hit_rate < 1
    assert oracle.monde.counters().num_resident_pairs == 0
    assert model._decode_runner.num_replays > num_steps // 4
    come_to_rest(model.monde)
    assert_consistent(model.monde)
    state = model.state_dict()
    assert all(torch.equal(state[key].cpu(), tensor) for key, tensor in original.state_dict().items())
