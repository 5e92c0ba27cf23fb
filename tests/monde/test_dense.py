"""Dense layers on CPUs without bf16 instructions: the same result, through faster products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from monde.models.dense import MIN_WIDENED_ROWS, HostLinear, speed_up_dense

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(200,), (1, 1, 200), (3, 200), (2, MIN_WIDENED_ROWS, 200), (0, 200)])
def test_result_is_the_exact_one_rounded(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 sums differ from exact ones by less than D epsilon sum|w x|; rounding adds 2^-8 relative."""
    monkeypatch.setattr("monde.models.dense.BLOCK_WEIGHTS", 7 * 200)  # several blocks, the last one short
    torch.manual_seed(0)
    layer = HostLinear(200, 33, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(shape).bfloat16()
    with torch.inference_mode():
        y = layer(x)
        b = layer.bias.double() if bias else None
        exact = F.linear(x.double(), layer.weight.double(), b)
        magnitude = F.linear(
            x.double().abs(), layer.weight.double().abs(), b.abs() if b is not None else None
        )
    assert y.shape == exact.shape
    assert y.dtype == torch.bfloat16
    bound = exact.abs() * 2**-8 + magnitude * 200 * 2**-23
    assert ((y.double() - exact).abs() <= bound).all()


def test_only_plain_bf16_layers_on_the_cpu_change(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        pass

    def model() -> nn.ModuleList:
        return nn.ModuleList(
            [nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2), Own(2, 2, dtype=torch.bfloat16)]
        )

    def kinds(device: torch.device, has_bf16: bool) -> list[type]:
        monkeypatch.setattr("monde.models.dense.cpu_multiplies_bf16", lambda: has_bf16)
        layers = model()
        speed_up_dense(layers, device)
        return [type(layer) for layer in layers]

    assert kinds(CPU, False) == [HostLinear, nn.Linear, Own]
    assert kinds(CPU, True) == kinds(torch.device("cuda"), False) == [nn.Linear, nn.Linear, Own]


def test_gradients_flow_as_through_a_plain_layer() -> None:
    layer = HostLinear(8, 8, dtype=torch.bfloat16)
    layer(torch.ones(2 * MIN_WIDENED_ROWS, 8).bfloat16()).sum().backward()
    assert layer.weight.grad is not None
