"""What a layer takes and what its experts do, told apart from layers of few and of many."""

from __future__ import annotations

import numpy as np
import pytest

from monde.calibration.gpu import GpuFits, expert_s, layer_of
from monde.calibration.host import TOKENS
from monde.calibration.samples import Samples, poor_fits


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


@pytest.mark.parametrize("scattered", ["", "round trip", "h2d", "GPU layer"])
def test_no_line_of_the_gpu_is_trusted_through_scattered_seconds(scattered: str) -> None:
    rng = np.random.default_rng(1)
    seconds = {
        f"{way} of {1 << i} bytes": 1e-5 + (1 << i) / 50e9 for way in ("h2d", "d2h") for i in range(16, 27, 2)
    }
    seconds |= {f"round trip, {t} tokens": 36e-6 + t * 4096 / 4e9 for t in (1, 4, 16, 64)}
    seconds |= {
        f"GPU layer of {a} experts, {t} tokens each": 2e-5 + a * t * 1e-6 for a in (8, 32) for t in TOKENS
    }
    taken = {
        what: Samples(
            tuple(rng.uniform(1e-5, 9e-5, 20)) if scattered and what.startswith(scattered) else (s,) * 20, ()
        )
        for what, s in seconds.items()
    }
    named = {"round trip": "round trips", "h2d": "copies to the GPU", "GPU layer": "GPU layers of"}
    poor = poor_fits(GpuFits.of(2048, taken).named())
    assert len(poor) == {"": 0, "GPU layer": len(TOKENS)}.get(scattered, 1)
    assert all(fit.what.startswith(named[scattered]) for fit in poor)
