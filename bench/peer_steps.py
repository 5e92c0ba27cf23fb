"""Shared by the programs that run a Python peer: the layer shape, random routing, timing, the JSON line."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

D, F, E, K, L = 2048, 768, 128, 8, 2  # model dim, expert hidden dim, experts, top-k, layers that alternate


def random_experts(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate_EFD, up_EFD, down_EDF in bf16."""
    torch.manual_seed(seed)
    gate_FD, up_FD, down_DF = (
        torch.randn(*shape).bfloat16() / shape[1] ** 0.5 for shape in ((F, D), (F, D), (D, F))
    )
    gate_EFD, up_EFD, down_EDF = (m.expand(E, -1, -1).contiguous() for m in (gate_FD, up_FD, down_DF))
    return gate_EFD, up_EFD, down_EDF


def random_routings(batch: int, num_routings: int = 64) -> list[torch.Tensor]:
    return [torch.stack([torch.randperm(E)[:K] for _ in range(batch)]) for _ in range(num_routings)]


def report(step: Callable[[int], None], seconds_s: float) -> None:
    """Time step(i) for `seconds_s` after a warm-up and print the JSON line that bench.peers reads."""
    for i in range(4):
        step(i)
    samples: list[float] = []
    end = time.perf_counter() + seconds_s
    while len(samples) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        step(len(samples))
        samples.append(time.perf_counter() - start)
    print(json.dumps({"us_med": statistics.median(samples) * 1e6, "num_steps": len(samples)}), flush=True)
