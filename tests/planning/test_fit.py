"""Fits of timings: what is exact, what noise may do, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monde.planning.fit import AlphaBeta, fit_alpha_beta

SIZES = [2.0**k for k in range(10, 27, 2)]


@given(st.floats(0, 1e-3), st.floats(1e-12, 1e-6))
def test_exact_timings_are_recovered(alpha_s: float, s_per_byte: float) -> None:
    fit = fit_alpha_beta(SIZES, [alpha_s + s_per_byte * x for x in SIZES])
    assert fit.alpha_s == pytest.approx(alpha_s, rel=1e-6, abs=1e-6 * s_per_byte * SIZES[0])
    assert fit.s_per_unit == pytest.approx(s_per_byte, rel=1e-6, abs=1e-8 * alpha_s / SIZES[-1])
    assert fit.num_rejected == 0


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e-4), st.floats(1e-11, 1e-9))
def test_a_fifth_of_spoilt_samples_changes_little(seed: int, alpha_s: float, s_per_byte: float) -> None:
    rng = np.random.default_rng(seed)
    x = np.repeat(SIZES, 5)
    y = (alpha_s + s_per_byte * x) * rng.uniform(0.98, 1.02, len(x))
    spoilt = rng.choice(len(x), len(x) // 5, replace=False)
    y[spoilt] *= rng.uniform(3, 20, len(spoilt))
    fit = fit_alpha_beta(x.tolist(), y.tolist())
    truth = AlphaBeta(alpha_s, s_per_byte)
    np.testing.assert_allclose(fit.seconds(x), truth.seconds(x), rtol=0.03)
    assert fit.num_rejected >= len(spoilt)
    assert fit.r2 > 0.99


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1e-7, 10)), min_size=3, max_size=20))
def test_never_negative(samples: list[tuple[float, float]]) -> None:
    sizes, seconds = [s for s, _ in samples], [t for _, t in samples]
    if len(set(sizes)) < 2:
        return
    fit = fit_alpha_beta(sizes, seconds)
    assert fit.alpha_s >= 0
    assert fit.s_per_unit >= 0
    assert fit.r2 <= 1


def test_a_falling_line_is_clamped_not_extrapolated() -> None:
    fit = fit_alpha_beta([1, 2, 3, 4], [4, 3.5, 3, 2.5])
    assert fit.s_per_unit == 0
    assert 2.5 <= fit.alpha_s <= 4


def test_noise_shows_in_r2() -> None:
    rng = np.random.default_rng(0)
    x = np.linspace(1e6, 2e6, 40)
    fit = fit_alpha_beta(x.tolist(), (1e-3 * rng.uniform(0.5, 1.5, 40)).tolist())
    assert fit.r2 < 0.5


def test_nothing_takes_no_time() -> None:
    assert AlphaBeta(1.0, 1.0).seconds(0) == 0
    assert AlphaBeta(1.0, 2.0).seconds(3) == 7


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, 0, 1]), ([1, 2, 3], [1, float("nan"), 1]), ([1, 2, 3], [1, 2])],
)  # fmt: skip
def test_refused(sizes: list[float], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="fit_alpha_beta: expected"):
        fit_alpha_beta(sizes, seconds)
