"""Every family on a real GPU: experts on the host, on both, all on the GPU, give the answers of the original there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import monde
from tests.models.animals import Animal
from tests.models.oracle import Specimen, examine
from tests.models.test_walk import assert_same_answers
from tests.models.zoo import EVERY_ANIMAL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=EVERY_ANIMAL)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    assert not torch.backends.cuda.matmul.allow_tf32  # it would round fp32 products to 10 bits
    animal: Animal = request.param
    return examine(animal, device="cuda")


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_placement_does_not_change_the_answers(specimen: Specimen, share: float) -> None:
    settings: dict[str, Any] = {"max_context": 64, "residency": "static"}
    original = copy.deepcopy(specimen.model).cpu()
    plan = monde.offload(copy.deepcopy(original), **settings).monde.plan
    gpu_memory = plan.gpu_used_bytes - plan.slots_bytes + int(share * plan.slots_bytes)
    model = monde.offload(original, gpu_memory=gpu_memory, **settings)
    assert_same_answers(model, specimen)
    counters = model.monde.counters()
    assert counters.num_pairs == specimen.num_pairs
    if share in (0, 1):
        assert counters.num_resident_pairs == share * specimen.num_pairs
    else:
        assert 0 < counters.num_resident_pairs < specimen.num_pairs
    model.monde.close()
