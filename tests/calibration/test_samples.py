"""Two halves of samples, what counts as noise, and overlaps that a plan can hold."""

from __future__ import annotations

import numpy as np
import pytest

from monde.calibration.overlap import beside_names, nearest_overlap, overlap_of
from monde.calibration.samples import Probe, Samples, noise_of, poor_fits, repeated, take
from monde.planning.fit import NOISY_SHARE, fit_alpha_beta
from monde.planning.profile import PoorFit


def scripted(what: str, first: list[float], second: list[float], order: list[str]) -> Probe:
    halves = iter([first, second])

    def run() -> dict[str, list[float]]:
        order.append(what)
        return {what: next(halves)}

    return Probe(what, run)


def test_all_first_halves_come_before_any_second() -> None:
    order: list[str] = []
    told: list[str] = []
    probes = [scripted("a", [1.0], [3.0, 5.0], order), scripted("b", [2.0], [2.0], order)]
    samples = take(probes, told.append)
    assert order == told == ["a", "b", "a", "b"]
    assert samples == {"a": Samples((1.0,), (3.0, 5.0)), "b": Samples((2.0,), (2.0,))}
    assert samples["a"].median_s == 3.0


def test_what_disagrees_runs_again_until_two_runs_agree() -> None:
    runs = {"calm": [1.0, 1.0], "once": [1.0, 2.0, 2.1], "never": [1.0, 2.0, 4.0, 8.0]}
    left, told = {what: iter(medians) for what, medians in runs.items()}, list[str]()

    def probe(what: str) -> Probe:
        return Probe(what, lambda: {what: [next(left[what])]})

    samples = take([probe(what) for what in runs], told.append, retry_until_s=60.0)
    assert told == [*runs, *runs, "once", "never", "never"]
    assert samples == {
        "calm": Samples((1.0,), (1.0,)),
        "once": Samples((2.0,), (2.1,)),
        "never": Samples((1.0,), (2.0,)),
    }
    assert [noise.what for noise in noise_of(samples)] == ["never"]


def test_noise_is_what_disagrees_in_either_direction() -> None:
    limit = 1 + NOISY_SHARE
    samples = {
        "calm": Samples((1.0, 1.0, 99.0), (1.0, limit - 0.01, limit - 0.01)),  # an outlier moves no median
        "slower": Samples((1.0,), (limit + 0.01,)),
        "quicker": Samples((limit + 0.01,), (1.0,)),
    }
    noises = noise_of(samples)
    assert [noise.what for noise in noises] == ["slower", "quicker"]
    assert all(noise.share == pytest.approx(NOISY_SHARE + 0.01) for noise in noises)
    assert "11% apart" in str(noises[0])


def test_a_line_that_explains_nothing_is_noise() -> None:
    rng = np.random.default_rng(0)
    sizes = np.repeat([1.0, 4.0, 16.0, 64.0], 20)
    fits = {
        "rising": fit_alpha_beta(sizes, 1e-3 + 1e-4 * sizes * rng.uniform(0.8, 1.2, 80)),
        "flat": fit_alpha_beta(sizes, 1e-3 * rng.uniform(0.9, 1.1, 80)),  # its r2 is low as well
        "scattered": fit_alpha_beta(sizes, 1e-3 * rng.uniform(0.4, 1.6, 80)),
    }
    assert fits["flat"].r2 < 0.5
    poor = poor_fits(fits)
    assert poor == (PoorFit("scattered", fits["scattered"].r2, fits["scattered"].spread),)
    assert poor[0].spread == pytest.approx(1.2 / 12**0.5, rel=0.2)
    assert "34% around their mean" in str(poor[0])


def test_repeated_warms_up_and_takes_three_at_least() -> None:
    calls: list[int] = []
    samples = repeated(lambda: calls.append(0), 0.0)
    assert (len(samples), len(calls)) == (3, 4)


@pytest.mark.parametrize(
    ("measured", "kept"),
    [
        ((1.3, 1.2), (1.3, 1.2)),
        ((0.9, 1.2), (1.0, 1.2)),
        ((2.0, 2.0), (2.0, 2.0)),
        ((4.0, 4.0), (2.0, 2.0)),  # worse than one after the other
        ((1.2, 60.0), (1.02, 51.0)),
    ],
)
def test_overlaps_are_brought_within_bounds(measured: tuple[float, float], kept: tuple[float, float]) -> None:
    overlap = nearest_overlap(*measured)
    assert (overlap.first, overlap.second) == pytest.approx(kept)


def test_an_overlap_compares_each_with_itself_alone() -> None:
    seconds = (2.0, 0.5, 3.0, 0.6)  # step, copy, step beside, copy beside
    samples = {name: Samples((s,), (s,)) for name, s in zip(beside_names("host"), seconds, strict=True)}
    overlap = overlap_of("host", samples)
    assert (overlap.first, overlap.second) == pytest.approx((1.5, 1.2))
