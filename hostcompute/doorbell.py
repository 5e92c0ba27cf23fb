"""Forwards that a GPU asks for by itself: a native thread polls a mailbox that both sides see, and answers.

native/runtime/doorbell.h has the protocol. Whoever rings needs nothing but stores to the mailbox, so any thread
can play the GPU in a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hostcompute.bank import ExpertBank
from hostcompute.pool import shared_pool
from hostcompute.spec import DType


@dataclass(frozen=True)
class MailboxAddresses:
    """Where the mailbox's parts lie. rung, answered and cut are 64-bit words, each on its own cache line.

    All but answered are there twice, box_bytes apart: for rings of even and of odd numbers.
    x: [T, D] of the model's activations; weights: float [T, K]; ids: int32 [2, T, K] and out: float [2, T, D], of what
    counts now and of what counts later.
    cut: panels of 16 rows of F that whoever rings computes itself, of every expert that counts now; an even number
    below all.
    """

    answered: int
    rung: int
    x: int
    ids: int
    weights: int
    out: int
    cut: int
    box_bytes: int


@dataclass(frozen=True)
class DoorbellTotals:
    """What the host answered so far."""

    num_rings: int
    num_pairs: int
    weight_bytes: int
    busy_s: float
    later_s: float  # of busy_s, for pairs that count later


class Doorbell:
    """Answers rings for `banks[layer]` until it is closed.

    memory: whoever owns the mailbox's, kept until the thread has ended, however the rest is torn down. deadline_s: after so long without an expected ring the
    thread sleeps, and looks once a millisecond. Errors: ValueError for banks of another backend than native.
    """

    def __init__(
        self,
        banks: Sequence[ExpertBank],
        mailbox: MailboxAddresses,
        x_dtype: DType,
        pool: Any = None,
        deadline_s: float = 1.0,
        memory: object = None,
    ) -> None:
        # Here, so that the module imports where the native one was not built.
        from hostcompute import _native
        from hostcompute.backends.native import NativeBackend

        backends = [bank.backend for bank in banks]
        natives = [backend.native_bank for backend in backends if isinstance(backend, NativeBackend)]
        if len(natives) != len(banks):
            names = {backend.name for backend in backends} - {"native"}
            raise ValueError(f"Doorbell: needs banks of the native backend, got {', '.join(sorted(names))}")
        self._doorbell: Any = _native.Doorbell(
            memory,
            natives,
            pool or shared_pool(),
            **vars(mailbox),
            x_dtype=x_dtype.value,
            deadline_s=deadline_s,
        )

    def expect(self, num_rings: int) -> None:
        """So many more rings are on their way; the thread polls until it has seen them."""
        self._doorbell.expect(num_rings)

    def reset(self) -> None:
        """Forget rings that never came and the latest error. Only while nobody rings."""
        self._doorbell.reset()

    @property
    def error(self) -> str:
        """What the latest failed forward said; empty if none failed since `reset`."""
        return str(self._doorbell.error)

    @property
    def totals(self) -> DoorbellTotals:
        return DoorbellTotals(*self._doorbell.totals)

    def reset_totals(self) -> None:
        self._doorbell.reset_totals()

    def close(self) -> None:
        """End the thread; a forward under way is finished first."""
        self._doorbell = None
