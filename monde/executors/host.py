"""Experts in host memory, computed there by hostcompute."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hostcompute import ExpertBank, make_pool
from hostcompute.topology import ALL_CORES, CoreShare, default_cores
from monde.core import RoutedBatch
from monde.weights.staging import Staging

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class HostTotals:
    """What the host did so far."""

    num_pairs: int = 0
    weight_bytes: int = 0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    busy_s: float = 0.0


@dataclass
class HostPending:
    """A batch in host memory, computed when waited for: what the device was given runs meanwhile."""

    bank: ExpertBank
    batch: RoutedBatch
    y_TD: Tensor
    totals: HostTotals
    device: torch.device | None = None  # where the result must go; None: it stays
    copied: torch.cuda.Event | None = None  # the batch has arrived

    def wait(self) -> Tensor:
        if self.copied is not None:
            self.copied.synchronize()
        start_s = time.perf_counter()
        self.bank.forward(self.batch.x_TD, self.batch.topk_ids_TK, self.batch.topk_weights_TK, self.y_TD)
        counts = self.bank.last_counts
        assert counts is not None
        self.totals.busy_s += time.perf_counter() - start_s
        self.totals.num_pairs += counts.num_pairs
        self.totals.weight_bytes += counts.weight_bytes
        if self.device is None:
            return self.y_TD
        self.totals.h2d_bytes += self.y_TD.nbytes
        return self.y_TD.to(self.device, non_blocking=True)


class HostExecutor:
    """Computes pairs of one layer on the host; activations of a GPU batch come and go through `staging`."""

    def __init__(self, bank: ExpertBank, staging: Staging) -> None:
        self.bank, self.staging = bank, staging
        self.totals = HostTotals()

    def submit(self, batch: RoutedBatch, out_dtype: torch.dtype) -> HostPending:
        x_TD = batch.x_TD
        if x_TD.is_cpu:
            here = RoutedBatch(
                x_TD.contiguous(), batch.topk_ids_TK.contiguous(), _weights(batch.topk_weights_TK)
            )
            return HostPending(self.bank, here, torch.empty_like(here.x_TD, dtype=out_dtype), self.totals)
        here = RoutedBatch(
            self._to_host("x", x_TD),
            self._to_host("ids", batch.topk_ids_TK),
            self._to_host("weights", _weights(batch.topk_weights_TK)),
        )
        y_TD = self.staging.view("y", tuple(x_TD.shape), out_dtype)
        copied = torch.cuda.Event()
        copied.record()
        return HostPending(self.bank, here, y_TD, self.totals, x_TD.device, copied)

    def _to_host(self, name: str, tensor: Tensor) -> Tensor:
        target = self.staging.view(name, tuple(tensor.shape), tensor.dtype)
        target.copy_(tensor, non_blocking=True)
        self.totals.d2h_bytes += tensor.nbytes
        return target


def _weights(topk_weights_TK: Tensor) -> Tensor:
    if topk_weights_TK.dtype not in _WEIGHT_DTYPES:
        topk_weights_TK = topk_weights_TK.float()
    return topk_weights_TK.contiguous()


def host_pool(num_threads: int | None, device: torch.device, share: CoreShare = ALL_CORES) -> Any:
    """The host kernels' threads; None for the process's own pool."""
    if num_threads is not None:
        return make_pool(num_threads, share)
    if device.type == "cuda":
        return make_pool(host_threads(share), share)
    return make_pool(None, share) if share.num_processes > 1 else None


def host_threads(share: CoreShare = ALL_CORES) -> int:
    """Threads of the host kernels next to a GPU: one core stays with who launches steps and spins for them."""
    return max(1, len(default_cores(share)) - 1)
