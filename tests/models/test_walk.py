"""Every family of the zoo on monde: same logits, same text, same weights back, wherever the experts lie."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import monde
from tests.models.animals import Animal
from tests.models.oracle import Specimen, ask, examine
from tests.models.zoo import EVERY_ANIMAL


@pytest.fixture(scope="module", params=EVERY_ANIMAL)
def specimen(request: pytest.FixtureRequest) -> Specimen:
    animal: Animal = request.param
    return examine(animal)


@pytest.fixture(scope="module")
def offloaded(specimen: Specimen) -> Iterator[Any]:
    model = monde.offload(copy.deepcopy(specimen.model), device="cpu")
    yield model
    model.monde.close()


def assert_same_answers(model: Any, specimen: Specimen) -> None:
    wanted, got = specimen.answers, ask(model, specimen.animal, specimen.inputs)
    for what in ("prefill", "decode"):
        if getattr(wanted, what) is None:
            continue
        error = (getattr(got, what) - getattr(wanted, what)).abs()
        worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        assert error.max() <= specimen.bound, (
            f"{what}: logit {worst} (sequence, position, token) is off by {error.max():.2e}, "
            f"bound {specimen.bound:.2e}"
        )
    if wanted.tokens is not None:
        assert torch.equal(got.tokens, wanted.tokens), "greedy text differs"


def test_bound_is_tight(specimen: Specimen) -> None:
    """A bound that lets real mistakes through would prove nothing."""
    assert 0 < specimen.bound < 1e-2 * specimen.answers.prefill.std()


def test_offload_gives_the_same_answers_and_computes_every_pair(specimen: Specimen, offloaded: Any) -> None:
    offloaded.monde.reset_counters()
    assert_same_answers(offloaded, specimen)
    assert specimen.num_pairs > 0
    assert offloaded.monde.counters().num_pairs == specimen.num_pairs


def test_offload_gives_the_weights_back(specimen: Specimen, offloaded: Any, tmp_path: Path) -> None:
    wanted, got = specimen.model.state_dict(), offloaded.state_dict()
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    specimen.model.save_pretrained(tmp_path / "original")
    offloaded.save_pretrained(tmp_path / "offloaded")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "offloaded" / file).read_bytes() == (tmp_path / "original" / file).read_bytes(), (
            file
        )


def test_weights_can_be_loaded_into_an_offloaded_model(specimen: Specimen) -> None:
    blank = copy.deepcopy(specimen.model)
    with torch.no_grad():
        for param in blank.parameters():
            param.zero_()
    model = monde.offload(blank, device="cpu")
    model.load_state_dict(specimen.model.state_dict())
    wanted, got = specimen.model.state_dict(), model.state_dict()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    model.monde.close()


def test_from_pretrained_gives_the_same_answers(specimen: Specimen, tmp_path: Path) -> None:
    specimen.model.save_pretrained(tmp_path)
    config = monde.MondeConfig(device="cpu")
    model = type(specimen.model).from_pretrained(tmp_path, quantization_config=config)
    assert_same_answers(model, specimen)
    assert model.monde.counters().num_pairs == specimen.num_pairs
    model.monde.close()


@pytest.mark.parametrize("share", ["half", "all"])
def test_placement_does_not_change_the_answers(specimen: Specimen, offloaded: Any, share: str) -> None:
    """device="cpu" with gpu_memory: the CPU stands in for the GPU and runs its code for resident experts."""
    all_slots_bytes = offloaded.monde.plan.size.all_slots_bytes
    gpu_memory = all_slots_bytes if share == "all" else all_slots_bytes // 2
    model = monde.offload(copy.deepcopy(specimen.model), device="cpu", gpu_memory=gpu_memory)
    assert_same_answers(model, specimen)
    counters = model.monde.counters()
    assert counters.num_pairs == specimen.num_pairs
    if share == "all":
        assert counters.num_resident_pairs == specimen.num_pairs
    else:
        assert 0 < counters.num_resident_pairs < specimen.num_pairs
    model.monde.close()
