"""The judging of deferral: perplexity is the model's own, the bound that of layers played one by one."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import monde
from bench import artefact, deferral
from bench.deferral import Quality, Step, Way, earlier, judge, windows
from tests.monde import tiny


def test_windows_are_spread_over_the_text() -> None:
    ids_WT = windows(list(range(5000)), num_windows=4)
    assert ids_WT[:, 0].tolist() == [0, 1250, 2500, 3750]
    assert ids_WT.shape == (4, deferral.NUM_TOKENS)
    with pytest.raises(ValueError, match="has 600 tokens, 1024 are needed"):
        windows(list(range(600)), num_windows=2)


def test_without_deferral_it_is_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferral, "NUM_PROMPT", 5)
    original, ids_WT = tiny.build("qwen3_moe"), tiny.prompt(3, 20)

    def model(num_deferred: int) -> Any:
        return monde.offload(tiny.build("qwen3_moe"), device="cpu", deferred_experts=num_deferred)

    left_out = model(2)
    left_out.monde.deferred.take = lambda: None
    models = {Way("deferred", 0): model(0), Way("deferred", 2): model(2), Way("left out", 2): left_out}
    exact, deferred, without = judge(models, "tiny", "random", ids_WT)
    with torch.no_grad():
        log_p = original(ids_WT).logits[:, 5:-1].log_softmax(-1)
    want_W = -log_p.gather(2, ids_WT[:, 6:, None])[..., 0].double().mean(1)
    assert exact.nll_W == pytest.approx(want_W.tolist(), rel=1e-4)
    assert exact.perplexity == pytest.approx(math.exp(float(want_W.mean())), rel=1e-4)
    assert (exact.same_greedy, exact.kl) == (1, 0)
    for other in (deferred, without):
        assert other.same_greedy < 1
        assert other.kl > 1e-4
    assert deferred.nll_W != without.nll_W


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    out, configuration = tmp_path / "one.json", {"texts": ["a", "b"]}
    one = Quality("model", "a", Way("left out", 1), [1.5, 2.0], 0.9, 0.1)
    assert earlier(out, configuration) == []
    artefact.write("deferral", configuration, {"quality": [asdict(one) | {"perplexity": 5.0}]}, out)
    assert earlier(out, configuration) == [one]
    assert earlier(out, {"texts": ["a"]}) == []


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 0.875])
@pytest.mark.parametrize("dense_s", [0.01, 0.3, 1.0])
def test_the_bound_is_that_of_layers_played_in_turn(share: float, dense_s: float) -> None:
    """The host takes a layer's own pairs when the GPU has routed, then those that are left; an answer takes 0.1 s."""
    step = Step(total_s=dense_s + 1.1, host_s=1.0, bus_share=0.25, host_slowdown=1.2)
    num_layers, host_free_s, gpu_s = 2000, 0.0, 0.0
    for _ in range(num_layers):
        routed_s = gpu_s + dense_s / num_layers
        answered_s = max(routed_s, host_free_s) + (1 - share) * step.host_s / num_layers
        host_free_s = answered_s + share * step.host_s / 0.75 / 1.2 / num_layers
        gpu_s = answered_s + 0.1 / num_layers
    assert gpu_s == pytest.approx(step.deferred_s(share), rel=1e-3)
