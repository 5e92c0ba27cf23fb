"""The zoo is complete and alive: every family is there, every model runs, and a seed fixes it."""

from __future__ import annotations

import pytest
import torch

from tests.models.animals import ANIMALS, ON_EXPERTS_INTERFACE, Animal
from tests.models.zoo import EVERY_ANIMAL, build, decorated_families, example_inputs


def test_every_family_on_the_experts_interface_is_in_the_zoo() -> None:
    missing = decorated_families() - {animal.family for animal in ANIMALS}
    assert not missing, f"new in this transformers: {sorted(missing)}; add them to tests/models/animals.py"


def test_no_family_left_the_experts_interface() -> None:
    gone = {animal.family for animal in ON_EXPERTS_INTERFACE if animal.is_available} - decorated_families()
    assert not gone, f"no longer on the experts interface: {sorted(gone)}; each needs an adapter now"


@pytest.mark.parametrize("animal", EVERY_ANIMAL)
def test_same_seed_same_model(animal: Animal) -> None:
    inputs = example_inputs(animal)
    with torch.no_grad():
        logits, again = (build(animal)(**inputs).logits for _ in range(2))
    assert torch.equal(logits, again)
    assert logits.isfinite().all()
    assert 0.01 < logits.std() < 10
