"""Profiles: what they promise, on disk and off."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monde.planning.machines import DESCRIBED
from monde.planning.profile import Curve, ExpertRate, HardwareProfile, MemoryChannels, Noise, Overlap, PoorFit


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_profile_survives_the_disk(name: str, tmp_path: Path) -> None:
    profile = DESCRIBED[name]
    profile.save(tmp_path / "p.json")
    assert HardwareProfile.load(tmp_path / "p.json", profile.machine) == profile


def test_a_profile_without_gpu_survives_the_disk(tmp_path: Path) -> None:
    noise = Noise("host read, 2 threads", 1e-10, 1.5e-10)
    profile = dataclasses.replace(
        DESCRIBED["h200"], gpu=None, noisy=(noise, PoorFit("round trips", 0.1, 0.4))
    )
    profile.save(tmp_path / "p.json")
    assert HardwareProfile.load(tmp_path / "p.json") == profile


def test_what_calibration_does_not_time_has_a_default(tmp_path: Path) -> None:
    path, profile = tmp_path / "p.json", DESCRIBED["h200"]
    assert profile.gpu is not None
    profile.save(path)
    data = json.loads(path.read_text())
    assert data["gpu"].pop("up_while_down") == dataclasses.asdict(profile.gpu.up_while_down)
    path.write_text(json.dumps(data))
    assert HardwareProfile.load(path) == profile
    gpu = dataclasses.replace(profile.gpu, up_while_down=Overlap(1.5, 1.2))
    dataclasses.replace(profile, gpu=gpu).save(path)
    assert HardwareProfile.load(path).gpu == gpu


def test_another_machine_or_version_is_refused(tmp_path: Path) -> None:
    path, profile = tmp_path / "p.json", DESCRIBED["h200"]
    profile.save(path)
    with pytest.raises(ValueError, match="run `monde calibrate` again"):
        HardwareProfile.load(path, DESCRIBED["laptop-4060"].machine)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "version": 99}))
    with pytest.raises(ValueError, match="profile version 99, expected 6"):
        HardwareProfile.load(path)
    path.write_text(json.dumps({**data, "host_read": {}}))
    with pytest.raises(ValueError, match="damaged hardware profile"):
        HardwareProfile.load(path)
    for text in ("[]", "not json", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a hardware profile"):
            HardwareProfile.load(path)


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8), st.floats(1, 1e9))
def test_a_table_gives_back_what_was_measured(seconds: list[float], expert_bytes: float) -> None:
    tokens = tuple(2**i for i in range(len(seconds)))
    rate = ExpertRate.from_table(tokens, tuple(seconds), expert_bytes, 1e6)
    t = np.asarray(tokens, float)
    predicted = np.maximum(expert_bytes / rate.bytes_per_s, t * 1e6 / rate.flops_per_s.at(t))
    np.testing.assert_allclose(predicted, seconds, rtol=1e-9)


def test_curve_is_constant_outside_and_linear_in_the_logarithm() -> None:
    curve = Curve((1, 4), (10, 30))
    np.testing.assert_allclose(curve.at([0.5, 1, 2, 4, 100]), [10, 10, 20, 30, 30])


def test_impossible_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="rising x"):
        Curve((2, 1), (1, 1))
    with pytest.raises(ValueError, match="Overlap: expected"):
        Overlap(3.0, 2.0)
    with pytest.raises(ValueError, match="Overlap: expected"):
        Overlap(0.9, 1.0)
    with pytest.raises(ValueError, match="MemoryChannels: expected"):
        MemoryChannels(0, 1e9)
    with pytest.raises(ValueError, match="ExpertRate: expected"):
        ExpertRate(0.0, 0.0, Curve((1,), (1,)))


def test_more_memory_bandwidth_helps_where_reading_was_the_limit() -> None:
    """A table in bf16, one operation per byte and token: 1 and 2 tokens read, 64 compute."""
    tokens, seconds = (1, 2, 64), (1.0, 1.02, 8.0)
    rate = ExpertRate.from_table(tokens, seconds, 1e6, 1e6)
    t = np.asarray(tokens, float)

    def predicted(r: ExpertRate) -> np.ndarray:
        return np.maximum(1e6 / r.bytes_per_s, t * 1e6 / r.flops_per_s.at(t))

    np.testing.assert_allclose(predicted(rate), seconds)
    np.testing.assert_allclose(predicted(rate.with_memory(1.25)), [1 / 1.25, 1.02 / 1.25, 8.0])
