"""The table of families agrees with the zoo, with transformers and with the documentation."""

from __future__ import annotations

import pytest
from transformers import DogeConfig, DogeForCausalLM

import monde
from docs.models_table import PAGE, render
from monde.models.families import FAMILIES, UNSUPPORTED, supported_families
from tests.models.animals import ANIMALS
from tests.models.zoo import tiny_config


def test_table_and_zoo_list_the_same_families() -> None:
    assert {family.name for family in FAMILIES} == {animal.family for animal in ANIMALS}
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_supported_families_are_those_of_the_installed_transformers() -> None:
    available = {animal.family for animal in ANIMALS if animal.is_available}
    assert {family.name for family in supported_families()} == available


def test_documentation_is_the_table() -> None:
    assert PAGE.read_text() == render(), "run python -m docs.models_table"


def test_a_family_that_is_not_supported_says_why() -> None:
    assert "doge" in UNSUPPORTED
    model = DogeForCausalLM(tiny_config(DogeConfig, {"is_moe": True, "num_experts": 16}))
    with pytest.raises(monde.UnsupportedModelError, match="doge: not supported, as its experts"):
        monde.offload(model, device="cpu")
