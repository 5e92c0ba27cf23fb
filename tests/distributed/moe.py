"""Random experts and ragged batches for tests over ranks, and how far a correct answer may be from float64.

W ranks, T tokens, E experts, K experts per token, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hostcompute import DType, ExpertBank, ExpertSpec
from hostcompute.backends.select import choose
from monde.core import RoutedBatch
from monde.executors.host import HostExecutor
from monde.executors.sharded import Compute
from monde.weights.parts import FfnSlice, Part, SomeExperts
from monde.weights.staging import Staging
from tests.hostcompute.bounds import CONFIDENCE, HALF_SUBNORMAL, UNIT, Expected, forward_bound
from tests.hostcompute.conftest import BF16_DOT_ISAS

_TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One layer and what every rank asks of it. skew: how much more often expert 0 is chosen, 0 for never more."""

    spec: ExpertSpec
    num_tokens_W: tuple[int, ...]
    num_topk: int
    x_dtype: str = "f32"
    skew: float = 0.0
    seed: int = 0
    num_chunks: int = 1
    same: bool = False  # whether all ranks ask for rank 0's batch

    @property
    def backend(self) -> str:
        """Every other case in float64, so that what is left is the arithmetic between ranks."""
        return "reference" if self.seed % 2 else "auto"

    @property
    def bf16_dots(self) -> bool:
        pairs = self.spec.dtype is DType.BF16 and self.x_dtype == "bf16"
        return pairs and choose(self.backend).isa in BF16_DOT_ISAS

    def experts(self) -> dict[int, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        D, F, dtype = self.spec.d_model, self.spec.d_ffn, _TORCH[self.spec.dtype.value]
        shapes: dict[str, tuple[int, ...]] = {"up": (F, D), "down": (D, F)}
        if self.spec.gated:
            shapes["gate"] = (F, D)
        if self.spec.has_bias:
            shapes |= {"up_bias": (F,), "down_bias": (D,)} | ({"gate_bias": (F,)} if self.spec.gated else {})
        return {
            e: {
                role: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)
                for role, shape in shapes.items()
            }
            for e in range(self.spec.num_experts)
        }

    def batch(self, rank: int) -> RoutedBatch:
        """Ids from -2 to E + 1, so that some name no expert and some repeat in a row; a fifth of the weights are 0."""
        rank = 0 if self.same else rank
        generator = torch.Generator().manual_seed(1000 * self.seed + rank + 1)
        T, K, E = self.num_tokens_W[rank], self.num_topk, self.spec.num_experts
        ids_TK = torch.randint(-2, E + 2, (T, K), generator=generator)
        ids_TK[torch.rand((T, K), generator=generator) < self.skew] = 0
        weights_TK = torch.rand((T, K), generator=generator)
        weights_TK[torch.rand((T, K), generator=generator) < 0.2] = 0
        x_TD = torch.randn((T, self.spec.d_model), generator=generator).to(_TORCH[self.x_dtype])
        return RoutedBatch(x_TD, ids_TK, weights_TK)


def compute_of(part: Part, experts: dict[int, dict[str, Tensor]], backend: str) -> Compute:
    """What a rank computes with its part of the experts."""
    bank = ExpertBank(part.spec, backend)
    for expert_id, arrays in experts.items():
        local_id = part.local_id(expert_id)
        if local_id is not None:
            bank.load(local_id, **part.take(arrays))
    executor = HostExecutor(bank, Staging(pinned=False))
    return lambda batch, out_dtype: executor.submit(batch, out_dtype).wait()


def expected(case: Case, parts: list[Part], rank: int) -> Expected:
    """The float64 answer and the bound of a sum of W partial sums: each by the kernels' own bound, in fp32, then W
    fp32 additions, then one rounding to x's type."""
    experts, batch = case.experts(), case.batch(rank)
    x_TD = batch.x_TD.double().numpy()
    weights_TK = batch.topk_weights_TK.double().numpy()
    value, error, largest = np.zeros_like(x_TD), np.zeros_like(x_TD), np.zeros_like(x_TD)
    for part in parts:
        held = {e: part.take(arrays) for e, arrays in experts.items() if part.local_id(e) is not None}
        stored = {e: {r: a.double().numpy() for r, a in arrays.items()} for e, arrays in held.items()}
        ids_TK = np.where(np.isin(batch.topk_ids_TK.numpy(), list(stored)), batch.topk_ids_TK.numpy(), -1)
        spec = replace(part.spec, num_experts=case.spec.num_experts)
        one = forward_bound(spec, stored, x_TD, ids_TK, weights_TK, "f32", case.bf16_dots)
        value, error, largest = value + one.value, error + one.error, largest + np.abs(one.value)
    error += CONFIDENCE * len(parts) ** 0.5 * UNIT["f32"] * (largest + error)
    error += UNIT[case.x_dtype] * (np.abs(value) + error) + HALF_SUBNORMAL[case.x_dtype]
    return Expected(value, error)


def slices(spec: ExpertSpec, cuts_W1: tuple[int, ...]) -> list[Part]:
    return [FfnSlice(spec, start, end) for start, end in pairwise(cuts_W1)]


def shares(spec: ExpertSpec, first_W1: tuple[int, ...]) -> list[Part]:
    return [SomeExperts(spec, first, end) for first, end in pairwise(first_W1)]
