"""The zero-copy share: the closed form against a fine grid, the controller against noisy machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monde.planning.profile import Overlap
from monde.planning.share import ShareController, best_share, rows_of

seconds = st.floats(0, 1)
overlaps = st.builds(Overlap, st.floats(1, 2), st.floats(1, 2))


def step_s(
    x: float, gpu_s: float, host_s: float, overlap: Overlap, gpu_lead: float, host_lead: float
) -> float:
    if x == 0:
        return max(gpu_lead, host_lead + host_s)
    if x == 1:
        return gpu_lead + gpu_s
    return max(gpu_lead + x * gpu_s * overlap.second, host_lead + (1 - x) * host_s * overlap.first)


@given(seconds, seconds, overlaps, seconds, seconds)
def test_no_share_is_better(
    gpu_s: float, host_s: float, overlap: Overlap, gpu_lead: float, host_lead: float
) -> None:
    best = best_share(gpu_s, host_s, overlap, gpu_lead, host_lead)
    assert 0 <= best.share <= 1
    assert best.step_s == pytest.approx(step_s(best.share, gpu_s, host_s, overlap, gpu_lead, host_lead))
    for x in np.linspace(0, 1, 101):
        assert best.step_s <= step_s(float(x), gpu_s, host_s, overlap, gpu_lead, host_lead) + 1e-12


def test_bandwidths_add_where_they_do_not_disturb_each_other() -> None:
    """55 and 107 GB/s: a third over the bus, and 1.5 times as fast as the host alone."""
    best = best_share(1 / 55, 1 / 107, Overlap())
    assert best.share == pytest.approx(55 / 162)
    assert best.step_s == pytest.approx(1 / 162)


def test_where_memory_is_the_limit_the_bus_stays_out() -> None:
    assert best_share(1.0, 1.0, Overlap(2.0, 2.0)).step_s == pytest.approx(1.0)
    assert best_share(1.0, 0.1, Overlap(1.5, 2.0), gpu_lead_s=0.2).share == 0


@given(st.floats(0, 1), st.integers(1, 4096), st.integers(1, 128))
def test_rows_are_whole_granules(share: float, d_ffn: int, granule: int) -> None:
    rows = rows_of(share, d_ffn, granule)
    assert 0 <= rows <= d_ffn
    assert rows % granule == 0 or rows == d_ffn
    assert abs(rows - share * d_ffn) <= granule


def run(controller: ShareController, gpu_s: float, host_s: float, num_steps: int, seed: int) -> list[float]:
    """Shares after each step of a machine with 10% noise and one step in ten up to four times too long."""
    rng = np.random.default_rng(seed)
    shares = []
    for _ in range(num_steps):
        noise = rng.lognormal(0, 0.1, 2) * np.where(rng.random(2) < 0.1, rng.uniform(1, 4, 2), 1.0)
        x = controller.share
        shares.append(controller.update(x * gpu_s * noise[0], (1 - x) * host_s * noise[1]))
    return shares


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10), st.sampled_from([0.25, 4.0]))
def test_a_profile_four_times_wrong_is_corrected_within_twenty_steps(
    seed: int, ratio: float, wrong: float
) -> None:
    gpu_s, host_s = 1e-3 * ratio, 1e-3
    controller = ShareController(best_share(gpu_s * wrong, host_s, Overlap()).share, min_share=0.02)
    ideal_s = best_share(gpu_s, host_s, Overlap()).step_s
    # The ratio of two quantiles of twelve samples with 10% noise has 5.4%; a search over seeds finds 4.5 times that,
    # and what is within 2% of balance is left alone.
    for x in run(controller, gpu_s, host_s, 60, seed)[19:]:
        assert max(x * gpu_s, (1 - x) * host_s) <= (1 + 4.5 * 0.054) * 1.02 * ideal_s
    later_s = [max(x * gpu_s, (1 - x) * host_s) for x in run(controller, gpu_s, host_s, 200, seed + 1)]
    assert np.mean(later_s) <= 1.06 * ideal_s  # noise moves it, but not far


@pytest.mark.parametrize("share", [0.15, 0.28, 0.5, 0.8])
@pytest.mark.parametrize("longer", [0.8, 1.25])
def test_a_side_that_always_waits_gets_more(share: float, longer: float) -> None:
    """Even where that is a small part of the step: the GPU's fifth of a quarter."""
    gpu_s, host_s = longer / share, 1 / (1 - share)
    controller = ShareController(share, min_share=0.02)
    for _ in range(12):
        x = controller.share
        controller.update(x * gpu_s, (1 - x) * host_s)
    x = controller.share
    assert max(x * gpu_s, (1 - x) * host_s) <= 1.021 * best_share(gpu_s, host_s, Overlap()).step_s


RECORD = Path(__file__).parents[2] / "bench" / "results" / "decode_layers_gpu_machine.json"


def recorded() -> list[Any]:
    """(seconds the bus and the host would take for all of F, step by step) of decode steps that were timed on an H100.

    The host's come from steps that it computed alone. Where both took part they ended together: less the round trip,
    the rest of the step is the bus' part too.
    """
    results = json.loads(RECORD.read_text())["results"]
    trip_s = results["ceilings"]["round_trip_s"]
    rows = {(row["contender"], row["batch"], row["num_resident"]): row for row in results["rows"]}
    cases = []
    for (contender, batch, num_resident), both in rows.items():
        if contender == "monde" and both["cold_bytes"]:
            alone = rows["host computes", batch, num_resident]
            bus_s = [(s - trip_s) / both["share"] for s in both["samples_s"]]
            host_s = [s - trip_s for s in alone["samples_s"]]
            cases.append(pytest.param(bus_s, host_s, id=f"batch {batch}, {num_resident} resident"))
    assert len(cases) == 6
    return cases


@pytest.mark.parametrize("wrong", [0.25, 4.0])
@pytest.mark.parametrize(("bus_s", "host_s"), recorded())
def test_recorded_steps_correct_a_profile_four_times_wrong_within_twenty(
    bus_s: list[float], host_s: list[float], wrong: float
) -> None:
    whole = float(np.median(bus_s)), float(np.median(host_s))
    controller = ShareController(best_share(whole[0] * wrong, whole[1], Overlap()).share, min_share=2 / 48)
    first = controller.share
    shares = [
        controller.update(controller.share * bus, (1 - controller.share) * host)
        for bus, host in zip(bus_s, host_s, strict=True)
    ]
    ideal_s = best_share(*whole, Overlap()).step_s

    def step_s(share: float) -> float:
        return max(share * whole[0], (1 - share) * whole[1])

    assert step_s(first) > 1.15 * ideal_s
    assert all(step_s(share) < 1.15 * ideal_s for share in shares[19:])


def test_without_noise_it_moves_once_and_stays() -> None:
    controller = ShareController(0.8, min_share=0.02)
    shares = [controller.update(controller.share * 4.0, (1 - controller.share) * 1.0) for _ in range(20)]
    assert shares[:11] == [0.8] * 11
    assert shares[11:] == [pytest.approx(0.2)] * 9


def test_fixed_costs_are_balanced_too() -> None:
    """A round trip that does not shrink with the share biases each estimate, not the balance reached."""
    controller = ShareController(0.9, min_share=0.02)
    for _ in range(60):
        x = controller.share
        controller.update(x * 1.0, 0.2 + (1 - x) * 1.0)
    x = controller.share
    assert x * 1.0 == pytest.approx(0.2 + (1 - x), rel=0.2)


def test_a_machine_that_changes_is_followed() -> None:
    controller = ShareController(0.5, min_share=0.02)
    run(controller, 1.0, 1.0, 20, 0)
    assert run(controller, 4.0, 1.0, 40, 1)[-1] == pytest.approx(0.2, abs=0.06)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="min_share"):
        ShareController(0.5, min_share=0.0)
    with pytest.raises(ValueError, match="above 0"):
        ShareController(0.5, min_share=0.1).update(0.0, 1.0)
