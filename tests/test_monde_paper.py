"""MoNDE's evaluation: what must hold whatever the assumptions."""

from __future__ import annotations

import numpy as np
import pytest

from bench.monde_paper import MODELS, Model, Workload, dense_s, schemes_s
from monde.planning.cost import CostModel
from monde.planning.machines import DESCRIBED


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_schemes_are_ordered(model: Model, part: str) -> None:
    """Each scheme contains those it must not lose to; the last product of a layer is not in the split's account."""
    cost = CostModel(DESCRIBED["monde-device"], model.shape)
    s = schemes_s(model, Workload(part, 4), cost, 0.0)
    slack = 1.03
    # With a few residents the near-data memory helps the GPU's: that may beat all resident, but nothing else may.
    assert s["ideal"] <= min(seconds for name, seconds in s.items() if "resident" not in name)
    assert s["MD+LB"] <= min(s["MD+AM"], s["GPU+PM"]) * slack
    assert s["monde, no slots"] <= s["MD+LB"] * slack
    assert s["1/4 resident"] <= s["1/8 resident"] * slack <= s["monde, no slots"] * slack**2
    if part == "decoder":
        assert s["no slots, zero-copy"] <= s["MD+AM"] * slack
        assert s["1/4 resident, zero-copy"] <= s["no slots, zero-copy"] * slack


def test_the_dense_part_is_a_roofline() -> None:
    model = MODELS[0]
    cost = CostModel(DESCRIBED["monde-device"], model.shape)
    one, many = (dense_s(model, Workload("encoder", b), cost, 0, 0.0) for b in (1, 16))
    assert many == pytest.approx(16 * one)
    assert dense_s(model, Workload("decoder", 1), cost, 1, 0.0) == pytest.approx(8 * 1024**2 * 2 / 1555e9)


def test_traffic_is_top_k_of_distinct_experts() -> None:
    traffic = Workload("decoder", 1).traffic(MODELS[1])
    assert traffic.tokens_LE.shape == (6, 128)
    assert (traffic.tokens_LE.sum(axis=1) == 2).all()
    assert traffic.tokens_LE.max() == 1
    many = Workload("encoder", 16).traffic(MODELS[1])
    heat = np.corrcoef(many.tokens_LE.ravel(), many.popularity_LE.ravel())[0, 1]
    assert heat > 0.95
