"""Steps as CUDA graphs, to be timed without the seconds of launching them."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`step` as a CUDA graph, after three steps to compile kernels and fill the allocator."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step()
    return graph
