"""`monde calibrate`: what is measured, kept, refused. Measuring itself is tests/calibration's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from monde import profile_store as store
from monde.calibration import measure
from monde.planning.machines import DESCRIBED
from monde.planning.profile import HardwareProfile, Noise, PoorFit
from tests.cli.conftest import Monde


class Measured:
    """In the place of the measurement: counts how often it is asked, and answers with `profile`."""

    def __init__(self) -> None:
        self.profile = dataclasses.replace(DESCRIBED["epyc-4090"], memory_channels=None)
        self.count = 0

    def __call__(self, machine: Any, start: Any = None) -> HardwareProfile:
        self.count += 1
        progress = start(1)
        progress("something")
        return dataclasses.replace(self.profile, machine=machine)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    stand_in = Measured()
    monkeypatch.setattr(measure, "calibrate", stand_in)
    return stand_in


def test_measured_once_and_again_by_force(monde: Monde, measured: Measured) -> None:
    first = monde("calibrate")
    assert first.exit_code == 0, first.stderr
    assert "stored in" in first.stderr
    assert "r2 1.0000" in first.stdout
    again = monde("calibrate", "--json")
    assert measured.count == 1
    assert "measured before" in again.stderr
    stored = store.load(store.this_machine())
    assert stored is not None
    assert json.loads(again.stdout) == json.loads(json.dumps(dataclasses.asdict(stored)))
    monde("calibrate", "--force")
    assert measured.count == 2


@pytest.mark.parametrize(
    "noise", [Noise("host read, 2 threads, per byte", 1e-11, 2e-11), PoorFit("round trips", 0.1, 0.4)]
)
def test_a_noisy_machine_is_trusted_by_request_alone(
    monde: Monde, measured: Measured, noise: Noise | PoorFit
) -> None:
    measured.profile = dataclasses.replace(measured.profile, noisy=(noise,))
    refused = monde("calibrate")
    assert refused.exit_code == 1
    assert refused.stderr.strip().count("\n") == 0
    assert "--accept-noise" in refused.stderr
    assert str(noise) in refused.stdout
    assert store.load(store.this_machine()) is None
    accepted = monde("calibrate", "--accept-noise")
    assert accepted.exit_code == 0
    stored = store.load(store.this_machine())
    assert stored is not None
    assert stored.noisy == (noise,)


def test_channels_are_added_without_measuring_again(monde: Monde, measured: Measured) -> None:
    monde("calibrate")
    assert monde("calibrate", "--memory-channels", "12x38.4").exit_code == 0
    assert measured.count == 1
    stored = store.load(store.this_machine())
    assert stored is not None
    assert stored.memory_channels == DESCRIBED["epyc-4090"].memory_channels


@pytest.mark.parametrize("text", ["12", "x38", "0x38", "12x0", "12x38GB"])
def test_channels_that_cannot_be(monde: Monde, measured: Measured, text: str) -> None:
    outcome = monde("calibrate", "--memory-channels", text)
    assert outcome.exit_code == 2
    assert "as in 12x38.4" in outcome.stderr


@pytest.mark.parametrize("given", ["absolute", "relative", "", None])
def test_the_profile_lies_in_the_cache_folder(
    monde: Monde, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / given) if given == "absolute" else given)
    outcome = monde("calibrate")
    assert outcome.exit_code == 0, outcome.stderr
    (stored,) = tmp_path.rglob("profile-*.json")
    assert stored.parent == tmp_path / ("absolute" if given == "absolute" else ".cache") / "monde"
    assert f"stored in {stored}" in outcome.stderr


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_nothing_is_measured_that_cannot_be_stored(
    monde: Monde, measured: Measured, tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / ".cache").write_text("a file where the folder should be")
    outcome = monde("calibrate", *options)
    assert (outcome.exit_code, measured.count) == (2, 0)
    assert outcome.stderr.count("\n") == 1
    assert f"monde: error: the profile cannot be stored in {tmp_path}/.cache/monde" in outcome.stderr
    assert "XDG_CACHE_HOME" in outcome.stderr
