"""Calibration on a real GPU: that everything is measured and plausible; the figures are nobody's test."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from hostcompute import ExpertSpec
from monde import profile_store as store
from monde.calibration import measure
from monde.calibration.host import TOKENS
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.profile import HardwareProfile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("hostcompute._native")
pytest.importorskip("cupy")

# Large enough for 24 experts more to show beside what a layer of a prompt takes to launch.
SMALL = measure.Effort(ExpertSpec(32, 2048, 1024), sample_s=0.05, read_bytes=1 << 26, copied_bytes=1 << 27)


def test_a_small_measurement(tmp_path: Path) -> None:
    machine, told = store.this_machine(), []
    profile = measure.calibrate(machine, SMALL, lambda num_probes: told.append)
    gpu = profile.gpu
    assert gpu is not None
    assert machine.gpu == torch.cuda.get_device_name()
    assert gpu.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    for fit in (gpu.h2d, gpu.d2h):
        assert 1e9 < 1 / fit.s_per_unit < 1e12  # from PCIe 3.0 x1 to NVLink
        assert fit.alpha_s < 1e-3
        assert fit.r2 > 0.9
    assert 1e-6 < gpu.round_trip.seconds(2048) < 1e-3
    assert 1e9 < gpu.zero_copy_bytes_per_s < 1e12
    assert gpu.expert.flops_per_s.x == TOKENS
    assert gpu.expert.bytes_per_s > profile.host_expert.bytes_per_s
    for overlap in (gpu.host_while_copying, gpu.gpu_while_copying):
        assert overlap.first >= 1
        assert overlap.second >= 1
    assert "host while copying" in told
    profile.save(tmp_path / "p.json")
    assert HardwareProfile.load(tmp_path / "p.json", machine) == profile
    cost = CostModel(profile, ExpertShape(2048, 1024))
    assert float(cost.resident_s(1)) < float(cost.fetched_s(1))


def test_a_full_measurement_takes_less_than_a_minute() -> None:
    start_s = time.perf_counter()
    profile = measure.calibrate(store.this_machine())
    print(dataclasses.asdict(profile))
    assert time.perf_counter() - start_s < 60
