"""Seconds for one expert, wherever it is computed. The only place where time is predicted.

    resident   overhead + max(bytes / HBM, flops / GPU(t))
    fetched    copy of its bytes, then as resident
    zero-copy  overhead + max(bytes / bus as kernels read it, flops / GPU(t))
    host       overhead + max(bytes / DRAM, flops / host(t))
    cut        a share of F fetched, the rest on the host, both at once

E experts, t tokens of an expert, D model dim, F expert hidden dim. An expert without tokens costs nothing.
Costs are alone on the machine; `overlapped_s` says what two of them take together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from monde.planning.profile import ExpertRate, GpuProfile, HardwareProfile, Overlap

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class ExpertShape:
    """One expert of a layer. weight_bits includes scales, 4.5 for int4 in groups of 32.

    weight_format: a name of planning.formats, by which the host's kernels were timed.
    """

    d_model: int
    d_ffn: int
    gated: bool = True
    weight_bits: float = 16
    act_bytes_per_value: int = 2
    weight_format: str = "bf16"

    @property
    def num_weights(self) -> int:
        return (3 if self.gated else 2) * self.d_model * self.d_ffn

    @property
    def expert_bytes(self) -> float:
        return self.num_weights * self.weight_bits / 8

    @property
    def flops_per_token(self) -> float:
        return 2.0 * self.num_weights

    @property
    def reads_panels(self) -> bool:
        """Whether a GPU multiplies long prompts straight from these experts' panels: bf16 by bf16."""
        return self.weight_format == "bf16" and self.act_bytes_per_value == 2

    @property
    def act_bytes_per_token(self) -> int:
        """Of one way: the input, or the output."""
        return self.d_model * self.act_bytes_per_value


@dataclass(frozen=True)
class CostModel:
    """Experts of one shape on one machine with a GPU.

    tokens may be a number or any array; share in [0, 1] is the part of F computed. Results have tokens' shape.
    """

    profile: HardwareProfile
    shape: ExpertShape

    @property
    def gpu(self) -> GpuProfile:
        if self.profile.gpu is None:
            raise ValueError(f"{self.profile.machine.name} has no GPU: everything runs on the host")
        return self.profile.gpu

    @property
    def host(self) -> ExpertRate:
        return self.profile.host_rate(self.shape.weight_format)

    def host_s(self, tokens: ArrayLike, share: ArrayLike = 1.0) -> Seconds:
        return self._computed_s(self.host, tokens, share)

    def resident_s(self, tokens: ArrayLike, share: ArrayLike = 1.0) -> Seconds:
        return self._computed_s(self.gpu.expert, tokens, share)

    def copy_s(self, share: ArrayLike = 1.0) -> Seconds:
        """The weights to the GPU, whatever the number of tokens."""
        return np.asarray(self.gpu.h2d.seconds(np.asarray(share, np.float64) * self.shape.expert_bytes))

    def fetched_s(self, tokens: ArrayLike, share: ArrayLike = 1.0) -> Seconds:
        computed_s = self.resident_s(tokens, share)
        return np.where(computed_s > 0, self.copy_s(share) + computed_s, 0.0)

    def zero_copy_s(self, tokens: ArrayLike, share: ArrayLike = 1.0) -> Seconds:
        rate = self.gpu.expert
        bus = ExpertRate(rate.overhead_s, self.gpu.zero_copy_bytes_per_s, rate.flops_per_s)
        return self._computed_s(bus, tokens, share)

    def cut_s(self, tokens: ArrayLike, gpu_share: ArrayLike) -> Seconds:
        """One expert alone, a share of its F fetched while the host computes the rest."""
        tokens, gpu_share = np.asarray(tokens), np.asarray(gpu_share, np.float64)
        host_s = self.host_s(tokens, 1 - gpu_share)
        copy_s = np.where(tokens > 0, self.copy_s(gpu_share), 0.0)
        both_s = overlapped_s(host_s, copy_s, self.gpu.host_while_copying)
        # The GPU's part follows its copy, which ends before or with the pair.
        slow = np.where(host_s > 0, self.gpu.host_while_copying.second, 1.0)
        copied_s = np.minimum(copy_s * slow, both_s)
        gpu_s: Seconds = copied_s + self.resident_s(tokens, gpu_share)
        return np.maximum(both_s, gpu_s)

    def round_trip_s(self, num_tokens: int) -> float:
        """Activations of `num_tokens` to the host and their results, in fp32, back.

        Few travel through the mailbox, which kernels write and read; many in copies, which start late and run fast.
        """
        act_bytes = num_tokens * self.shape.act_bytes_per_token
        fp32_bytes = num_tokens * self.shape.d_model * 4
        copies_s = float(self.gpu.d2h.seconds(act_bytes)) + float(self.gpu.h2d.seconds(fp32_bytes))
        return min(float(self.gpu.round_trip.seconds(act_bytes)), copies_s)

    def prompt_trip_s(self, num_tokens: int) -> float:
        """What the host's part in a long prompt's layer takes beside its experts, Python's share included."""
        return self.round_trip_s(num_tokens) + self.gpu.prompt.host_s

    def work_s(self, rate: ExpertRate, tokens: ArrayLike) -> Seconds:
        """Seconds of a whole expert without the overhead; a share of F takes that share of them."""
        t = np.asarray(tokens, np.float64)
        flops = t * self.shape.flops_per_token
        return np.maximum(self.shape.expert_bytes / rate.bytes_per_s, flops / rate.flops_per_s.at(t))

    def _computed_s(self, rate: ExpertRate, tokens: ArrayLike, share: ArrayLike) -> Seconds:
        seconds = rate.overhead_s + np.asarray(share) * self.work_s(rate, tokens)
        return np.where((np.asarray(tokens) > 0) & (np.asarray(share) > 0), seconds, 0.0)


@overload
def overlapped_s(first_s: float, second_s: float, overlap: Overlap) -> float: ...
@overload
def overlapped_s(first_s: Seconds, second_s: Seconds, overlap: Overlap) -> Seconds: ...
def overlapped_s(first_s: Any, second_s: Any, overlap: Overlap) -> Any:
    """When both of two activities that start together are done; each alone takes the seconds given.

    Both run slowed until one ends; the other finishes alone. With a, b alone and slow-downs s, u:
        a s <= b u:  a s + (b - a s / u)       otherwise:  b u + (a - b u / s)
    which is the larger of b + a s (1 - 1/u) and a + b u (1 - 1/s), because 1/s + 1/u >= 1: so it never falls when
    a or b grows, and is convex in both. The exactness of the split rests on these two facts.
    """
    s, u = overlap.first, overlap.second
    return greatest(second_s + first_s * (s * (1 - 1 / u)), first_s + second_s * (u * (1 - 1 / s)))


def greatest(a: Any, b: Any) -> Any:
    """Of numbers or of arrays; the latter take twenty times as long for one number."""
    return max(a, b) if isinstance(a, float) and isinstance(b, float) else np.maximum(a, b)
