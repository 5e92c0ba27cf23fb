"""What the host's threads did and when, recorded by the native kernels: for timelines, off otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field

from hostcompute.bank import ExpertBank

CAPACITY = 1 << 18  # spans; a decode step of 48 layers on 16 threads makes some 1600


@dataclass(frozen=True)
class HostSpan:
    """A forward of a bank (thread -1), or what one thread did of a phase.

    Times are nanoseconds of CLOCK_MONOTONIC, which is Python's time.monotonic_ns. bank is `bank_id` of whose forward
    it is, 0 for phases; tokens, pairs and bytes are of forwards, units of phases.
    """

    name: str
    start_ns: int
    end_ns: int
    bank: int
    thread: int
    num_tokens: int
    num_pairs: int
    weight_bytes: int
    num_units: int


@dataclass
class HostTimeline:
    """`with HostTimeline() as timeline: ...`, then its spans. One at a time in a process; another one ends it.

    Errors: ImportError where the native module is missing.
    """

    capacity: int = CAPACITY
    spans: list[HostSpan] = field(default_factory=list)
    num_dropped: int = 0  # what did not fit

    def __enter__(self) -> HostTimeline:
        from hostcompute import _native

        _native.timeline_start(self.capacity)
        return self

    def __exit__(self, *exc: object) -> None:
        from hostcompute import _native

        spans, self.num_dropped = _native.timeline_stop()
        self.spans = sorted((HostSpan(*span) for span in spans), key=lambda span: span.start_ns)


def bank_id(bank: ExpertBank) -> int:
    """HostSpan.bank of its forwards. Errors: ValueError for a bank of another backend than native."""
    from hostcompute.backends.native import NativeBackend

    backend = bank.backend
    if not isinstance(backend, NativeBackend):
        raise ValueError(
            f"timeline: only the native backend records what it does, this bank runs on {backend.name}"
        )
    return int(backend.native_bank.timeline_id)
