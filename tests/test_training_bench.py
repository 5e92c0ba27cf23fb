"""The study of configured layers: how many, and that no schedule of ours loses to one it contains."""

from __future__ import annotations

import itertools

import pytest

from bench.training_layers import GAMMAS, TESTBEDS, Layer, configured, forward_stages, step_s


def test_as_many_layers_as_the_paper() -> None:
    for testbed in TESTBEDS:
        layers = list(configured(testbed))
        assert len(set(layers)) == len(layers) == 1458 // 3  # three numbers of heads each


def test_work_by_hand() -> None:
    """A: 2 * 512 tokens of 1024, top-2 at 1.2: 2.5 million elements of one GPU."""
    stages = forward_stages(Layer(2, 512, 1024, 2048, 1.2, False), TESTBEDS[0])
    elements = 2 * 512 * 1024 * 2 * 1.2
    assert stages.dispatch is not None
    assert stages.gather is not None
    assert stages.dispatch.work_s == pytest.approx(elements * 2.3201e-9)
    assert stages.gather.work_s == pytest.approx(8 * elements * 2.3478e-10)
    assert stages.experts.work_s == pytest.approx(4 * elements * 2048 * 2.29e-14)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_never_slower_than_what_it_is_compared_with(gamma: float) -> None:
    for testbed in TESTBEDS:
        for layer in itertools.islice(configured(testbed), 0, None, 97):
            made = step_s(layer, testbed, gamma)
            assert (
                made["monde"]
                < made["tutel, gradients beside attention"]
                <= made["tutel"]
                <= made["deepspeed"]
            )


def test_layers_of_a_model_share_the_gradients() -> None:
    layer = Layer(1, 512, 1024, 4096, 1.2, True)
    one, four = (step_s(layer, TESTBEDS[0], 1.19, n) for n in (1, 4))
    assert four["deepspeed"] == pytest.approx(4 * one["deepspeed"])
    assert four["monde"] < four["tutel"]
