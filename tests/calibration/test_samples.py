"""Two halves of samples, what counts as noise, and overlaps that a plan can hold."""

from __future__ import annotations

import pytest

from monde.calibration.overlap import beside_names, nearest_overlap, overlap_of
from monde.calibration.samples import NOISY_SHARE, Probe, Samples, noise_of, repeated, take


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
