"""Captured kernels begin before what is in front of them has ended, and still see all of it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
        reason="needs a CUDA device of capability 9.0",
    ),
]
if torch.cuda.is_available():
    from monde.device.kernels.launch import Kernel
    from monde.device.kernels.step import normalise, project, rotate

D = 1024
_PROGRAMMATIC = 1  # CUgraphDependencyType


class _EdgeData(ctypes.Structure):
    _fields_ = (
        ("from_port", ctypes.c_uint8),
        ("to_port", ctypes.c_uint8),
        ("type", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 5),
    )


def captured(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    step()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        y = step()
    return graph, y


def num_early(graph: torch.cuda.CUDAGraph) -> int:
    """Edges of the graph over which a kernel begins before the other has ended."""
    driver, handle, count = (
        ctypes.CDLL("libcuda.so.1"),
        ctypes.c_void_p(graph.raw_cuda_graph()),
        ctypes.c_size_t(),
    )
    assert driver.cuGraphGetEdges_v2(handle, None, None, None, ctypes.byref(count)) == 0
    nodes, edges = ctypes.c_void_p * count.value, (_EdgeData * count.value)()
    assert driver.cuGraphGetEdges_v2(handle, nodes(), nodes(), edges, ctypes.byref(count)) == 0
    return sum(edge.type == _PROGRAMMATIC for edge in edges)


def weights(count: int) -> list[Tensor]:
    torch.manual_seed(count)
    return [torch.randn(D, D, device="cuda", dtype=torch.bfloat16) * D**-0.5 for _ in range(count)]


@pytest.mark.parametrize(
    "between", ["nothing", "an operation", "a copy", "a fill", "a side stream", "two kernels"]
)
def test_a_chain_answers_as_launched_one_by_one(between: str) -> None:
    """Where what is read was written by the kernel just in front, long before, or by something that is no kernel."""
    matrices, one_D = weights(8), torch.ones(D, device="cuda", dtype=torch.bfloat16)
    x = torch.zeros(1, D, device="cuda", dtype=torch.bfloat16)
    kept, side = torch.empty_like(x), torch.cuda.Stream()

    def step() -> Tensor:
        y = x
        for matrix in matrices * 8:
            z = project(y, matrix)
            if between == "an operation":
                z = z + y
            elif between == "a copy":
                z = kept.copy_(z).clone()
            elif between == "a fill":
                z = kept.zero_().add_(z).clone()
            elif between == "a side stream":
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    beside = normalise(z, one_D, 1e-6)
                z = normalise(project(z, matrix), one_D, 1e-6)
                torch.cuda.current_stream().wait_stream(side)
                z = normalise(z + beside, one_D, 1e-6)
            elif between == "two kernels":
                normalise(z, one_D, 1e-6)
                project(one_D[None], matrix)
            y = normalise(z, one_D, 1e-6)
        return y

    graph, y = captured(step)
    graph.instantiate()
    assert num_early(graph) > 0
    for seed in range(20):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        expected = step()
        for _ in range(3):
            y.fill_(torch.nan)
            graph.replay()
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_what_was_written_three_launches_before_is_there() -> None:
    """By a long kernel, where a short one that reads none of it lies between, and the reader waits for the latest alone."""
    B, H, T, C = 4, 32, 256, 128
    source = torch.zeros(B, H, T, C, device="cuda", dtype=torch.bfloat16)
    few = torch.ones(1, 1, 1, C, device="cuda", dtype=torch.bfloat16)
    cos, sin = (make(1, T, C, device="cuda", dtype=torch.bfloat16) for make in (torch.ones, torch.zeros))

    def step() -> Tensor:
        copy, _ = rotate(source, source, cos, sin)
        normalise(few, few.view(-1), 1e-6)
        zeros, _ = rotate(source, source, sin, sin)
        return copy + zeros

    graph, y = captured(step)
    graph.instantiate()
    for seed in range(20):
        torch.manual_seed(seed)
        source.copy_(torch.randn_like(source))
        graph.replay()
        assert torch.equal(y, source.transpose(1, 2).contiguous().transpose(1, 2))


def test_a_launch_that_the_driver_refuses_is_told() -> None:
    from monde.device.kernels.step import _functions

    kernel = _functions(torch.bfloat16)["normalise"]
    assert isinstance(kernel, Kernel)
    with (
        pytest.raises(RuntimeError, match="error 1 of the CUDA driver"),
        torch.cuda.stream(torch.cuda.Stream()),
    ):
        kernel._launch_early((1,), (4096,), (0, 0, 0), 0)
    torch.cuda.synchronize()
