"""NLLB-MoE both ways: as its router asks (the default), and as transformers runs it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import monde
from tests.models.animals import ANIMALS
from tests.models.oracle import EPS
from tests.models.zoo import build, example_inputs

NLLB = next(animal for animal in ANIMALS if animal.family == "nllb_moe")


def experts_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "NllbMoeExperts"]


def one_expert(module: nn.Module, expert_id: int, x_D: Tensor) -> Tensor:
    """fc2(relu(fc1(x))) in fp64, from the weights alone."""
    w = {name: p.double() for name, p in module.named_parameters() if name.startswith(f"expert_{expert_id}.")}
    fc1, fc2 = f"expert_{expert_id}.fc1", f"expert_{expert_id}.fc2"
    h_F = (w[f"{fc1}.weight"] @ x_D + w[f"{fc1}.bias"]).clamp(min=0)
    return w[f"{fc2}.weight"] @ h_F + w[f"{fc2}.bias"]


@pytest.fixture
def call() -> tuple[Tensor, Tensor, Tensor]:
    """x_TD, the router's top-1 mask_TE and combine weights_TE; the last token's second choice is dropped."""
    torch.manual_seed(0)
    x_TD = torch.randn(5, 32)
    top1_T, top2_T = torch.tensor([3, 0, 1, 5, 2]), torch.tensor([1, 4, 0, 2, 5])
    mask_TE = nn.functional.one_hot(top1_T, 6)
    weights_TE = 0.7 * mask_TE + 0.3 * nn.functional.one_hot(top2_T, 6)
    weights_TE[-1, 5] = 0
    return x_TD, mask_TE, weights_TE


def test_default_follows_the_router(call: tuple[Tensor, Tensor, Tensor]) -> None:
    x_TD, mask_TE, weights_TE = call
    model = build(NLLB)
    module = experts_modules(model)[0]
    wanted_TD = torch.stack(
        [
            sum(float(w) * one_expert(module, e, x_D.double()) for e, w in enumerate(w_E) if w)
            for x_D, w_E in zip(x_TD, weights_TE, strict=True)
        ]
    ) * (1 - module.moe_token_dropout)
    with torch.no_grad():
        got_TD = monde.offload(model, device="cpu") and module(x_TD, mask_TE, weights_TE)
    assert (got_TD - wanted_TD).abs().max() <= 100 * EPS * wanted_TD.abs().max()
    assert model.monde.counters().num_pairs == int((weights_TE != 0).sum())


def test_upstream_routing_is_that_of_transformers(call: tuple[Tensor, Tensor, Tensor]) -> None:
    model = build(NLLB)
    upstream = copy.deepcopy(model)
    monde.offload(model, device="cpu", nllb_upstream_routing=True)
    with torch.no_grad():
        wanted_TD, got_TD = (experts_modules(m)[0](*call) for m in (upstream, model))
        wanted, got = (m(**example_inputs(NLLB)).logits for m in (upstream, model))
    assert (got_TD - wanted_TD).abs().max() <= 100 * EPS * wanted_TD.abs().max()
    assert (got - wanted).abs().max() <= 1000 * EPS * wanted.abs().max()


def test_upstream_uses_experts_0_and_1_alone(call: tuple[Tensor, Tensor, Tensor]) -> None:
    """The reason for the correction, kept as a test: when transformers mends it, this fails."""
    module = experts_modules(build(NLLB))[0]
    with torch.no_grad():
        before_TD = module(*call)
        for expert_id in range(2, 6):
            module[f"expert_{expert_id}"].fc1.weight.mul_(-1)
        assert torch.equal(module(*call), before_TD)
