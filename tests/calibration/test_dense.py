"""What a block takes beside its bytes: measured on whatever device there is."""

from __future__ import annotations

import pytest
import torch

from monde.calibration.dense import DenseProbes
from monde.calibration.samples import take


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_a_block_of_next_to_nothing(device: str) -> None:
    probes = DenseProbes(torch.device(device))
    told: list[str] = []
    samples = take(probes.probes(), told.append)
    assert 10e-6 < probes.eager_block_s(samples) < 0.1
    assert 0 <= probes.step_s(samples) < 0.1
    if device == "cuda":
        assert 1e-6 < probes.captured_block_s(samples, 4e12) < probes.eager_block_s(samples)
    else:
        assert told == ["eager block without experts", "decode step of one block"] * 2
