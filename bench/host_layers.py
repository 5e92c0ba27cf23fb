"""The layers that the host benchmarks time: random bf16 experts, shared by ours and torch's loop.

Letters: L layers, T tokens, E experts, K top-k, A active experts, D model dim, F expert hidden dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench.rounds import Measure
from hostcompute import DType, ExpertBank, ExpertSpec, make_pool

Routing = npt.NDArray[np.int64]

# Two roundings to bf16, of x and of the hidden activations, each a relative 2^-9 in the root mean square, and
# the rounding of the answer; twice that is out of reach of a correct kernel.
CORRECT_RELATIVE_RMS = 2 * (3**0.5) * 2.0**-9


@dataclass(frozen=True)
class Layer:
    """One layer's experts, row-major bf16 as checkpoints hold them."""

    gate_EFD: torch.Tensor
    up_EFD: torch.Tensor
    down_EDF: torch.Tensor

    @property
    def spec(self) -> ExpertSpec:
        E, F, D = self.gate_EFD.shape
        return ExpertSpec(E, D, F, DType.BF16)


def make_layer(spec: ExpertSpec, seed: int) -> Layer:
    """One random expert, repeated with rolled rows: distinct memory, and quick to make."""
    generator = torch.Generator().manual_seed(seed)
    E, D, F = spec.num_experts, spec.d_model, spec.d_ffn

    def matrices(rows: int, columns: int) -> torch.Tensor:
        one = (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()
        all_ENK = torch.empty(E, rows, columns, dtype=torch.bfloat16)
        for e in range(E):
            all_ENK[e] = one.roll(e, 0)
        return all_ENK

    return Layer(matrices(F, D), matrices(F, D), matrices(D, F))


def make_bank(layer: Layer, backend: str, isa: str | None, num_threads: int | None) -> ExpertBank:
    """All experts of `layer` in a bank of `backend`."""
    pool = None if backend == "reference" else make_pool(num_threads)
    return fill_bank(layer, ExpertBank(layer.spec, backend, pool=pool, isa=isa))


def fill_bank(layer: Layer, bank: ExpertBank) -> ExpertBank:
    for e in range(layer.spec.num_experts):
        bank.load(e, gate=layer.gate_EFD[e], up=layer.up_EFD[e], down=layer.down_EDF[e])
    return bank


def bank_step(
    banks: Sequence[ExpertBank], x_TD: torch.Tensor, routings: Sequence[Routing]
) -> Callable[[int], None]:
    """Step i: the next layer with the next routing, into a buffer of its own."""
    out_TD = torch.empty_like(x_TD)
    weights_TK = np.full(routings[0].shape, 1 / routings[0].shape[1], np.float32)

    def step(i: int) -> None:
        banks[i % len(banks)].forward(x_TD, routings[i % len(routings)], weights_TK, out=out_TD)

    return step


def native_measure(banks: Sequence[ExpertBank], x_TD: torch.Tensor, routings: Sequence[Routing]) -> Measure:
    """bank_step in the seconds that the forward takes where native callers, a GPU's doorbell among them, call it."""
    out_TD = torch.empty_like(x_TD)
    weights_TK = np.full(routings[0].shape, 1 / routings[0].shape[1], np.float32)
    count = 0

    def measure(seconds_s: float) -> list[float]:
        nonlocal count
        samples: list[float] = []
        end = time.perf_counter() + seconds_s
        while len(samples) < 4 or time.perf_counter() < end:
            count += 1
            ids_TK = routings[count % len(routings)]
            pending = banks[count % len(banks)].submit(x_TD, ids_TK, weights_TK, out=out_TD)
            pending.wait()
            samples.append(pending.busy_s)
        return samples[1:]  # the first one wakes the threads

    return measure


def torch_step(
    layers: Sequence[Layer], x_TD: torch.Tensor, routings: Sequence[Routing], num_threads: int
) -> Callable[[int], None]:
    """What eager transformers does on a CPU: F.linear in bf16, one expert after the other."""
    prepared = [(torch.from_numpy(ids), np.unique(ids).tolist()) for ids in routings]
    weight = 1 / routings[0].shape[1]

    @torch.no_grad()
    def step(i: int) -> None:
        torch.set_num_threads(num_threads)
        layer, (ids_TK, experts) = layers[i % len(layers)], prepared[i % len(prepared)]
        y_TD = torch.zeros_like(x_TD)
        for e in experts:
            tokens = (ids_TK == e).any(1).nonzero()[:, 0]
            x = x_TD[tokens]
            h = torch.nn.functional.silu(x @ layer.gate_EFD[e].T) * (x @ layer.up_EFD[e].T)
            y_TD.index_add_(0, tokens, (h @ layer.down_EDF[e].T) * weight)

    return step


def rotating(spec: ExpertSpec, num_active: int, num_tokens: int) -> list[Routing]:
    """Every token goes to the same A experts, the next A in every step, so caches hold none."""
    E = spec.num_experts
    firsts = range(0, E - num_active + 1, num_active)
    return [np.tile(np.arange(first, first + num_active), (num_tokens, 1)) for first in firsts]


def random_routings(spec: ExpertSpec, top_k: int, num_tokens: int, num_routings: int) -> list[Routing]:
    rng = np.random.default_rng(0)
    return [
        np.stack([rng.permutation(spec.num_experts)[:top_k] for _ in range(num_tokens)])
        for _ in range(num_routings)
    ]


def check(bank: ExpertBank, layer: Layer) -> float:
    """Relative error (root mean square) of 5 tokens over 2 experts against the float64 oracle.

    Errors: RuntimeError above CORRECT_RELATIVE_RMS, because the time of a wrong answer means nothing.
    """
    generator = torch.Generator().manual_seed(5)
    x_TD = torch.randn(5, layer.spec.d_model, generator=generator)
    ids_TK, weights_TK = np.array([[0, 1]] * 5), np.full((5, 2), 0.5, np.float32)
    with ExpertBank(layer.spec, "reference") as oracle:
        for e in (0, 1):
            oracle.load(e, gate=layer.gate_EFD[e], up=layer.up_EFD[e], down=layer.down_EDF[e])
        expected_TD = oracle.forward(x_TD, ids_TK, weights_TK)
    error = float((bank.forward(x_TD, ids_TK, weights_TK) - expected_TD).norm() / expected_TD.norm())
    if not error <= CORRECT_RELATIVE_RMS:
        raise RuntimeError(
            f"{bank.choice.name} {bank.choice.isa}: relative error {error:.3g} > {CORRECT_RELATIVE_RMS:.3g}"
        )
    return error
