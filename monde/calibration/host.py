"""What the host can do: reading memory by threads, and experts by tokens with the kernels that will compute them.

Letters: T tokens, E experts, A active experts of one call, D model dim, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch

from hostcompute import DType, ExpertBank, ExpertSpec, read_bandwidth
from monde.calibration.samples import Probe, Samples, Timings, repeated
from monde.planning.cost import ExpertShape
from monde.planning.profile import Curve, ExpertRate
from monde.weights.packing import TORCH_DTYPES

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FORMAT_TOKENS = (1, 4, 16, 64, 256)  # of other formats, whose curves bend where that of bf16 does
FORMATS = {"fp32": DType.F32, "fp16": DType.F16}  # besides bf16, by the names of planning.formats
_NUM_ACTIVE = 8  # of a call with few tokens: what a call costs by itself is shared, as in a layer
_MAX_ROWS = 128  # and fewer experts where tokens are many, to stay quick


class HostProbes:
    """A bank of `spec` in memory of its own for every expert, and what is timed on it."""

    def __init__(self, spec: ExpertSpec, pool: Any, sample_s: float, read_bytes: int) -> None:
        self.spec, self.sample_s, self.read_bytes = spec, sample_s, read_bytes
        self.num_threads: int = pool.num_threads
        self.bank = fill(ExpertBank(spec, "native", pool))
        self.formats = {
            name: fill(ExpertBank(format_spec(spec, dtype), "native", pool))
            for name, dtype in FORMATS.items()
        }

    def probes(self) -> list[Probe]:
        reads = [Probe(_read_name(n), partial(self._read, n)) for n in self._thread_counts()]
        in_bf16 = [Probe(_expert_name(t), partial(self._experts, t)) for t in TOKENS]
        others = [
            Probe(_expert_name(t, name), partial(self._experts, t, name))
            for name in self.formats
            for t in FORMAT_TOKENS
        ]
        return reads + in_bf16 + others

    def step(self, num_tokens: int, format_name: str = "bf16") -> tuple[Callable[[], None], int]:
        """A call in which A experts take `num_tokens` each, others in every call, so that caches hold none; and A."""
        bank = self.formats.get(format_name, self.bank)
        spec = bank.spec
        num_active = min(_NUM_ACTIVE, max(1, _MAX_ROWS // num_tokens), spec.num_experts)
        x_TD = torch.randn(num_tokens, spec.d_model).to(TORCH_DTYPES[spec.dtype])
        weights_TA = torch.full((num_tokens, num_active), 1 / num_active)
        out_TD, routings = torch.empty_like(x_TD), rotating(spec.num_experts, num_active, num_tokens)
        turn = count()

        def call() -> None:
            bank.forward(x_TD, routings[next(turn) % len(routings)], weights_TA, out=out_TD)

        return call, num_active

    def read_curve(self, samples: dict[str, Samples]) -> Curve:
        counts = self._thread_counts()
        rates = tuple(1 / samples[_read_name(n)].median_s for n in counts)
        return Curve(tuple(map(float, counts)), rates)

    def expert_rate(self, samples: dict[str, Samples]) -> ExpertRate:
        seconds = tuple(samples[_expert_name(t)].median_s for t in TOKENS)
        return rate_of(self.spec, seconds)

    def format_rates(self, samples: dict[str, Samples]) -> dict[str, ExpertRate]:
        return {
            name: rate_of(
                bank.spec,
                tuple(samples[_expert_name(t, name)].median_s for t in FORMAT_TOKENS),
                FORMAT_TOKENS,
            )
            for name, bank in self.formats.items()
        }

    def close(self) -> None:
        for bank in (self.bank, *self.formats.values()):
            bank.close()

    def _thread_counts(self) -> list[int]:
        """Powers of two, and all."""
        powers = [2**i for i in range(self.num_threads.bit_length()) if 2**i < self.num_threads]
        return [*powers, self.num_threads]

    def _read(self, num_threads: int) -> Timings:
        bytes_per_s = read_bandwidth(num_threads, self.read_bytes, repeats=3)
        return {_read_name(num_threads): [1 / bytes_per_s]}

    def _experts(self, num_tokens: int, format_name: str = "bf16") -> Timings:
        call, num_active = self.step(num_tokens, format_name)
        return {
            _expert_name(num_tokens, format_name): [s / num_active for s in repeated(call, self.sample_s)]
        }


def format_spec(spec: ExpertSpec, dtype: DType) -> ExpertSpec:
    """Experts of another type in half the memory: caches do not hold that either."""
    num_experts = spec.num_experts * spec.dtype.itemsize_bytes // (2 * dtype.itemsize_bytes)
    return replace(spec, num_experts=max(1, num_experts), dtype=dtype)


def fill(bank: ExpertBank) -> ExpertBank:
    """One random expert in the place of every expert: the native backend packs a copy for each."""
    spec = bank.spec
    dtype = TORCH_DTYPES[spec.dtype]
    gate_up_2FD = [(torch.randn(spec.d_ffn, spec.d_model) * 0.02).to(dtype) for _ in range(2)]
    down_DF = (torch.randn(spec.d_model, spec.d_ffn) * 0.02).to(dtype)
    for expert_id in range(spec.num_experts):
        bank.load(expert_id, gate=gate_up_2FD[0], up=gate_up_2FD[1], down=down_DF)
    return bank


def rotating(num_experts: int, num_active: int, num_tokens: int) -> list[torch.Tensor]:
    """topk_ids_TA of calls in which all tokens go to the same A experts, the next A in every call."""
    firsts = range(0, num_experts - num_active + 1, num_active)
    return [torch.arange(f, f + num_active).repeat(num_tokens, 1) for f in firsts]


def rate_of(spec: ExpertSpec, seconds: tuple[float, ...], tokens: tuple[int, ...] = TOKENS) -> ExpertRate:
    """From seconds of one expert for every number of `tokens`."""
    shape = ExpertShape(spec.d_model, spec.d_ffn, spec.gated)
    return ExpertRate.from_table(tokens, seconds, spec.expert_bytes, shape.flops_per_token)


def _read_name(num_threads: int) -> str:
    return f"host read, {num_threads} threads, per byte"


def _expert_name(num_tokens: int, format_name: str = "bf16") -> str:
    other = "" if format_name == "bf16" else f" in {format_name}"
    return f"host expert{other}, {num_tokens} tokens"
