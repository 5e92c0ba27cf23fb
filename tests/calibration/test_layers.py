"""What a layer takes and what its experts do, told apart from layers of few and of many."""

from __future__ import annotations

import pytest

from monde.calibration.gpu import expert_s, layer_of
from monde.calibration.samples import Samples


def samples(few_s: float, many_s: float) -> dict[str, Samples]:
    spoilt = (few_s, few_s * 1.001, few_s * 9)
    return {
        "GPU layer of 8 experts, 4 tokens each": Samples(spoilt, (few_s,) * 3),
        "GPU layer of 32 experts, 4 tokens each": Samples((many_s,) * 3, (many_s,) * 3),
    }


def test_a_layer_and_its_experts() -> None:
    layer = layer_of(4, samples(19e-6 + 8 * 3e-6, 19e-6 + 32 * 3e-6))
    assert layer.alpha_s == pytest.approx(19e-6, rel=0.01)
    assert layer.s_per_unit == pytest.approx(3e-6, rel=0.01)
    assert layer.num_rejected == 1


def test_a_layer_takes_no_negative_time() -> None:
    assert layer_of(4, samples(10e-6, 50e-6)).alpha_s == 0


def test_experts_hidden_behind_the_launch_of_their_layer_take_at_most_what_larger_ones_do() -> None:
    hidden = layer_of(4, samples(20e-6, 20e-6)).s_per_unit
    assert expert_s([hidden, 2e-6, 0.0, 5e-6]) == (2e-6, 2e-6, 5e-6, 5e-6)
    with pytest.raises(ValueError, match="took no longer than 8; measure again"):
        expert_s([2e-6, hidden])
