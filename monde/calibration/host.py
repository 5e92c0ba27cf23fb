"""What the host can do: reading memory by threads, and experts by tokens with the kernels that will compute them.

Letters: T tokens, E experts, A active experts of one call, D model dim, F expert hidden dim.
"""

from __future__ import annotations

import statistics
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
# Experts of a call, and how many times as many: their difference is free of the call's own cost.
_FEW, _MORE = 8, 4
_MAX_ROWS = 128  # of the few; fewer experts where tokens are many, to stay quick
_CALL_TOKENS = 16  # a call's own cost is told by those with up to so many, whose experts are quick


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

    def few_and_more(self, num_tokens: int, format_name: str = "bf16") -> tuple[int, int]:
        """Active experts of the two calls that are timed."""
        most: int = self._bank(format_name).spec.num_experts
        few = min(_FEW, max(1, _MAX_ROWS // num_tokens), most // 2)
        return few, min(_MORE * few, most)

    def step(self, num_tokens: int, num_active: int, format_name: str = "bf16") -> Callable[[], None]:
        """A call in which A experts take `num_tokens` each, others in every call, so that caches hold none."""
        bank = self._bank(format_name)
        spec = bank.spec
        x_TD = torch.randn(num_tokens, spec.d_model).to(TORCH_DTYPES[spec.dtype])
        weights_TA = torch.full((num_tokens, num_active), 1 / num_active)
        out_TD, routings = torch.empty_like(x_TD), rotating(spec.num_experts, num_active, num_tokens)
        turn = count()

        def call() -> None:
            bank.forward(x_TD, routings[next(turn) % len(routings)], weights_TA, out=out_TD)

        return call

    def read_curve(self, samples: dict[str, Samples]) -> Curve:
        counts = self._thread_counts()
        rates = tuple(1 / samples[_read_name(n)].median_s for n in counts)
        return Curve(tuple(map(float, counts)), rates)

    def expert_rate(self, samples: dict[str, Samples], format_name: str = "bf16") -> ExpertRate:
        tokens = TOKENS if format_name == "bf16" else FORMAT_TOKENS
        seconds = tuple(self._fit(samples, t, format_name)[1] for t in tokens)
        return rate_of(self._bank(format_name).spec, seconds, tokens)

    def format_rates(self, samples: dict[str, Samples]) -> dict[str, ExpertRate]:
        return {name: self.expert_rate(samples, name) for name in self.formats}

    def expert_s(self, samples: dict[str, Samples], num_tokens: int) -> float:
        """Of one expert in bf16, for one of TOKENS."""
        return self._fit(samples, num_tokens)[1]

    def call_s(self, samples: dict[str, Samples]) -> float:
        """What a call takes beside its experts."""
        return statistics.median(self._fit(samples, t)[0] for t in TOKENS if t <= _CALL_TOKENS)

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
        return {
            _call_name(num_active, num_tokens, format_name): repeated(
                self.step(num_tokens, num_active, format_name), self.sample_s / 2
            )
            for num_active in self.few_and_more(num_tokens, format_name)
        }

    def _fit(
        self, samples: dict[str, Samples], num_tokens: int, format_name: str = "bf16"
    ) -> tuple[float, float]:
        """Seconds of a call by itself and of one expert; where more experts took no longer, all is the experts'."""
        few, more = self.few_and_more(num_tokens, format_name)
        few_s, more_s = (samples[_call_name(a, num_tokens, format_name)].median_s for a in (few, more))
        expert_s = (more_s - few_s) / (more - few)
        if expert_s <= 0 or few * expert_s > few_s:
            return 0.0, more_s / more
        return few_s - few * expert_s, expert_s

    def _bank(self, format_name: str) -> ExpertBank:
        return self.formats.get(format_name, self.bank)


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
    return f"host experts{_in(format_name)}, {num_tokens} tokens"


def _call_name(num_active: int, num_tokens: int, format_name: str) -> str:
    return f"host, {num_active} experts{_in(format_name)}, {num_tokens} tokens each"


def _in(format_name: str) -> str:
    return "" if format_name == "bf16" else f" in {format_name}"
