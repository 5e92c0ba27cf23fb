"""Which rule splits a prompt changes time, never the answer. The CPU stands in for the GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import monde
from monde.cli.options import SplitPolicyName
from monde.config import SPLIT_POLICY_NAMES
from monde.planning.split import Where
from monde.planning.split_policies import SPLIT_POLICIES
from tests.monde import tiny

pytest.importorskip("hostcompute._native")


def under(policy: str, original: Any) -> Any:
    """A copy of which some experts have slots."""
    plan = monde.offload(copy.deepcopy(original), device="cpu").monde.plan
    gpu_memory = int(plan.size.all_slots_bytes) // 3
    return monde.offload(
        copy.deepcopy(original), device="cpu", gpu_memory=gpu_memory, split_policy=policy, residency="static"
    )


@pytest.mark.parametrize("policy", SPLIT_POLICIES)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_answers_do_not_depend_on_the_rule(name: str, policy: str) -> None:
    original, ids = tiny.build(name), tiny.prompt(length=60)
    model = under(policy, original)
    with torch.no_grad():
        tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
    for layer in model.monde.layers:
        plan = layer.device.latest
        assert plan is not None
        expected = SPLIT_POLICIES[policy](plan.load, model.monde.prefill.cost(layer.device.shape))
        assert (plan.split.where_E == expected.where_E).all()
        assert plan.split.cut_rows == expected.cut_rows
        if policy == "all-fetch":
            assert not (plan.split.where_E == Where.HOST).any()
        if policy not in ("best", "all-fetch"):
            assert not plan.staged


def test_configuration_and_command_line_know_every_rule() -> None:
    assert [name.value for name in SplitPolicyName] == list(SPLIT_POLICIES)
    assert list(SPLIT_POLICY_NAMES) == list(SPLIT_POLICIES)


def test_a_rule_that_changes_nothing_says_so() -> None:
    with pytest.warns(
        RuntimeWarning, match="split_policy fiddler changes nothing: all experts are on the host"
    ):
        monde.offload(tiny.build("mixtral"), device="cpu", split_policy="fiddler")
