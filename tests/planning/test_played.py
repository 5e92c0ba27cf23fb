"""Recorded routing, played: what the forecast expects of dice, what a trace file holds, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from monde.core import NOT_MINE, Placement
from monde.planning.cost import ExpertShape
from monde.planning.forecast import ModelOutline, MoeLayer, forecast_decode, forecast_prefill
from monde.planning.machines import DESCRIBED
from monde.planning.played import RoutedStep, play
from monde.planning.schedule import Resource
from monde.routing.trace import Trace

L, E, K = 6, 32, 4
LAYER = MoeLayer(ExpertShape(2048, 768), K, np.full(E, 1 / E))
MODEL = ModelOutline((LAYER,) * L, L, 300_000_000, 2, 12_288, 8, 4096, 64, 4096)
H200 = DESCRIBED["h200"]


def placed(num_resident: int) -> list[Placement]:
    return [Placement(tuple(e if e < num_resident else -1 for e in range(E)))] * L


def diced(num_steps: int, num_tokens: int, seed: int = 0) -> list[RoutedStep]:
    rng = np.random.default_rng(seed)
    return [
        [rng.random((num_tokens, E)).argpartition(K, axis=1)[:, :K] for _ in range(L)]
        for _ in range(num_steps)
    ]


@pytest.mark.parametrize("name", DESCRIBED)
@pytest.mark.parametrize(("batch", "num_resident"), [(1, 0), (1, 16), (8, 16), (8, 32)])
def test_dice_take_what_the_forecast_expects(name: str, batch: int, num_resident: int) -> None:
    """The forecast takes the maximum of expected lanes, a step the maximum of its own: at most a little more."""
    played = play(diced(60, batch), MODEL, placed(num_resident), DESCRIBED[name], 512)
    expected_s = forecast_decode(MODEL, placed(num_resident), DESCRIBED[name], batch, 512).step_s
    assert 0.93 * expected_s < np.mean(played.step_s) < 1.15 * expected_s


def test_prompts_take_what_the_forecast_expects() -> None:
    played = play(diced(3, 512), MODEL, placed(8), H200, 512)
    expected_s = forecast_prefill(MODEL, placed(8), H200, 512).step_s
    # The forecast launches dense kernels ahead of the GPU; here they stand in line.
    assert expected_s * 0.9 < np.mean(played.step_s) < 1.3 * expected_s
    assert {Resource.HOST, Resource.GPU, Resource.PCIE_UP, Resource.LAUNCHES} == set(played.busy_s)


def test_routing_that_meets_residents_is_quicker(tmp_path: Path) -> None:
    steps = diced(20, 1)
    meets = [[ids_TK % 8 for ids_TK in step] for step in steps]
    Trace("demo", (E,) * L, tuple(tuple(i.astype(np.int16) for i in step) for step in meets)).save(
        tmp_path / "t"
    )
    recorded = Trace.load(tmp_path / "t")
    hot = play(recorded.steps, MODEL, placed(8), H200, 512)
    cold = play(steps, MODEL, placed(8), H200, 512)
    assert max(hot.step_s) < min(cold.step_s)
    assert Resource.HOST not in hot.busy_s
    more = dataclasses.replace(MODEL, layers=(dataclasses.replace(LAYER, zero_copy=False),) * L)
    assert sum(play(steps, more, placed(8), H200, 512).step_s) > sum(cold.step_s)


def test_pairs_that_do_not_count_take_no_time() -> None:
    none = [[np.full((1, K), NOT_MINE) for _ in range(L)]]
    all_resident = play(diced(1, 1), MODEL, placed(E), H200, 512).step_s[0]
    assert play(none, MODEL, placed(0), H200, 512).step_s[0] < all_resident


def test_without_a_gpu_everything_is_host() -> None:
    played = play(diced(4, 1), MODEL, placed(0), dataclasses.replace(H200, gpu=None), 16)
    assert set(played.busy_s) == {Resource.HOST}
    assert sum(played.step_s) == pytest.approx(played.busy_s[Resource.HOST])


def test_a_trace_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 6 layers a step, got 5; give the trace of this model"):
        play([diced(1, 1)[0][:5]], MODEL, placed(0), H200, 16)
    with pytest.raises(ValueError, match="layer 0 has 32 experts, got 40"):
        play([[np.full((1, K), 40)] * L], MODEL, placed(0), H200, 16)
    with pytest.raises(ValueError, match=f"a token takes {K} experts, got {K + 1}; give the trace"):
        play([[np.full((1, K + 1), 3)] * L], MODEL, placed(0), H200, 16)
