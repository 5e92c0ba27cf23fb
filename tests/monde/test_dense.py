"""Dense layers on the CPU: the same result, through faster products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hostcompute import make_pool
from hostcompute.dense import DenseKernel
from monde.models.dense import MIN_WIDENED_ROWS, HostLinear, speed_up_dense
from monde.models.host_threads import give_cores_to_decode
from monde.models.on_cpu import speed_up_on_cpu

CPU = torch.device("cpu")


def host_linear(num_inputs: int, num_outputs: int, bias: bool, kernel: bool, widens: bool) -> HostLinear:
    layer = HostLinear(num_inputs, num_outputs, bias=bias, dtype=torch.bfloat16)
    if kernel:
        pytest.importorskip("hostcompute._native")
        layer._kernel = DenseKernel(make_pool(2))
    layer._widens = widens
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_inputs", [200, 1, 96])
@pytest.mark.parametrize(
    "shape", [(), (1, 1), (2,), (3,), (2, 2), (5,), (2, MIN_WIDENED_ROWS), (0,)], ids=str
)
@pytest.mark.parametrize("isa", [None, "scalar"])
def test_result_is_the_exact_one_rounded(
    shape: tuple[int, ...], num_inputs: int, bias: bool, isa: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 sums differ from exact ones by less than K epsilon sum|w x|; rounding adds 2^-8 relative."""
    monkeypatch.setattr("monde.models.dense.BLOCK_WEIGHTS", 7 * 200)  # several blocks, the last one short
    monkeypatch.setattr("monde.models.dense.MIN_KERNEL_WEIGHTS", 0)
    if isa is not None:
        monkeypatch.setenv("MONDE_CPU_ISA", isa)
    torch.manual_seed(0)
    layer = host_linear(num_inputs, 33, bias, kernel=True, widens=True)
    x = torch.randn(*shape, num_inputs).bfloat16()
    with torch.inference_mode():
        y = layer(x)
        b = layer.bias.double() if bias else None
        exact = F.linear(x.double(), layer.weight.double(), b)
        magnitude = F.linear(
            x.double().abs(), layer.weight.double().abs(), b.abs() if b is not None else None
        )
    assert y.shape == exact.shape
    assert y.dtype == torch.bfloat16
    bound = exact.abs() * 2**-8 + magnitude * (num_inputs + 1) * 2**-23
    assert ((y.double() - exact).abs() <= bound).all()


def test_many_outputs_are_all_written() -> None:
    """More units than threads, weights that are a slice of something larger."""
    pytest.importorskip("hostcompute._native")
    torch.manual_seed(1)
    weights_NK, x_TK = torch.randn(3001, 520).bfloat16()[:, 3:515], torch.randn(4, 512).bfloat16()
    y_TN = torch.full((4, 3001), torch.nan).bfloat16()
    DenseKernel(make_pool(2))(x_TK, weights_NK, None, y_TN)
    exact_TN = x_TK.double() @ weights_NK.double().T
    magnitude_TN = x_TK.double().abs() @ weights_NK.double().abs().T
    assert ((y_TN.double() - exact_TN).abs() <= exact_TN.abs() * 2**-8 + magnitude_TN * 513 * 2**-23).all()


def test_what_does_not_fit_is_refused() -> None:
    pytest.importorskip("hostcompute._native")
    kernel = DenseKernel(make_pool(1))
    x_TK, weights_NK = torch.zeros(2, 8).bfloat16(), torch.zeros(4, 8).bfloat16()
    with pytest.raises(ValueError, match=r"out: expected shape \(2, 4\), got \(2, 5\)"):
        kernel(x_TK, weights_NK, None, torch.zeros(2, 5).bfloat16())
    with pytest.raises(ValueError, match="x: expected bf16"):
        kernel(x_TK.float(), weights_NK, None, torch.zeros(2, 4).bfloat16())
    with pytest.raises(ValueError, match="at most 4 rows, got 5"):
        kernel(torch.zeros(5, 8).bfloat16(), weights_NK, None, torch.zeros(5, 4).bfloat16())


def test_only_plain_bf16_layers_on_the_cpu_change() -> None:
    class Own(nn.Linear):
        pass

    def model() -> nn.ModuleList:
        return nn.ModuleList(
            [nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2), Own(2, 2, dtype=torch.bfloat16)]
        )

    def kinds(device: torch.device) -> list[type]:
        layers = model()
        speed_up_on_cpu(layers, device, None)
        return [type(layer) for layer in layers]

    assert kinds(CPU) == [HostLinear, nn.Linear, Own]
    assert kinds(torch.device("cuda")) == [nn.Linear, nn.Linear, Own]


def test_gradients_flow_as_through_a_plain_layer() -> None:
    layer = host_linear(8, 8, bias=True, kernel=True, widens=True)
    layer(torch.ones(2 * MIN_WIDENED_ROWS, 8).bfloat16()).sum().backward()
    assert layer.weight.grad is not None


# ---- threads ----
def test_few_rows_run_on_one_thread_of_torch_and_then_all_are_back() -> None:
    pytest.importorskip("hostcompute._native")
    seen: list[int] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, dtype=torch.bfloat16)

        def forward(self, input_ids: torch.Tensor) -> int:
            seen.append(torch.get_num_threads())
            if input_ids.shape[1] == 3:
                raise RuntimeError("from inside")
            return seen[-1]

    model, before = Model(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        speed_up_dense(model)
        give_cores_to_decode(model)
        assert model(torch.zeros(1, 1, dtype=torch.int64)) == 1
        assert model(input_ids=torch.zeros(2, 2, dtype=torch.int64)) == 1
        assert model(torch.zeros(1, 64, dtype=torch.int64)) == 2
        with pytest.raises(RuntimeError, match="from inside"):
            model(torch.zeros(1, 3, dtype=torch.int64))
        assert torch.get_num_threads() == 2
        assert seen == [1, 1, 2, 1]
    finally:
        torch.set_num_threads(before)
