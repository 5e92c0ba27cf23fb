"""RMS norms as one operation: found by what they compute, and the same afterwards up to one rounding."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersLayerNorm

from monde.models.norms import FusedRMSNorm, fuse_norms


class EpsOutside(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


def norm(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    module = MixtralRMSNorm(96, eps=1e-5).to(dtype)
    nn.init.normal_(module.weight)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_up_to_one_rounding(dtype: torch.dtype) -> None:
    module = norm(dtype)
    plain, x = copy.deepcopy(module), torch.randn(3, 5, 96).to(dtype)
    assert fuse_norms(module) == 1
    assert isinstance(module, FusedRMSNorm)
    y, want = module(x), plain(x)
    exact = F.rms_norm(x.double(), (96,), module.weight.double(), 1e-5)
    assert y.dtype is dtype
    info = torch.finfo(dtype)
    step = (
        info.smallest_normal * info.eps
    )  # between numbers next to zero, where roundings are no longer relative
    bound = info.eps / 2 * exact.abs() + 96 * 2**-23 * exact.abs() + step / 2
    assert ((y.double() - exact).abs() <= bound).all()
    assert torch.allclose(y.double(), want.double(), rtol=3 * info.eps, atol=2 * step)


def test_weights_are_as_before() -> None:
    module = norm()
    before = module.weight.clone()
    fuse_norms(module)
    assert torch.equal(module.weight, before)
    assert list(module.state_dict()) == ["weight"]


@pytest.mark.parametrize(
    "make", [lambda: Gemma2RMSNorm(96), lambda: EpsOutside(96), lambda: Qwen3NextRMSNormGated(96)]
)
def test_other_formulas_stay(make: object) -> None:
    module = make()  # type: ignore[operator]
    kind = type(module)
    assert fuse_norms(nn.ModuleList([module, nn.LayerNorm(96), nn.Linear(96, 4)])) == 0
    assert type(module) is kind


def test_t5_has_it_too() -> None:
    assert fuse_norms(nn.ModuleList([SwitchTransformersLayerNorm(64), MixtralRMSNorm(32)])) == 2


def test_other_types_take_the_models_own_way() -> None:
    module = norm()
    plain, x = copy.deepcopy(module), torch.randn(2, 96)
    fuse_norms(module)
    assert torch.equal(module(x), plain(x))
    assert module(x).dtype is torch.float32


def test_copies_pickles_and_gradients() -> None:
    module, x = norm(torch.float32), torch.randn(2, 96)
    fuse_norms(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    module(x).sum().backward()
    assert module.weight.grad is not None
    assert fuse_norms(module) == 0  # twice is once
