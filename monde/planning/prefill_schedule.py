"""What one layer does with many tokens, in which order: the only place that says so.

The executor does the tasks in this order, the simulator tells how long they take. A task's payload says what to do:

    Arriving    what was fetched ahead is on its way                            bus
    Fetch       pieces into the next staging buffer, when its readers are done   bus
    OnHost      experts, and the last rows of F of the cut one                   host, round trip included
    Place       the device's rows, expert by expert; products are launched       launches
    Residents   experts in slots                                                 GPU
    Multiply    what a buffer brought; then it is free                           GPU
    Combine     everybody's rows to a sum a token                                GPU

E experts, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monde.planning.cost import CostModel
from monde.planning.schedule import Resource, Schedule, ScheduleBuilder
from monde.planning.split import ExpertSplit, Load, Where
from monde.planning.staging import Piece, Staging, pieces_of

_RESIDENT, _FETCHED, _HOST = (np.int8(where) for where in (Where.RESIDENT, Where.FETCHED, Where.HOST))
Experts = NDArray[np.int64]
Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Arriving:
    """Shipment `idx` of those fetched ahead."""

    idx: int


@dataclass(frozen=True)
class Fetch:
    pieces: Pieces


@dataclass(frozen=True, eq=False)
class OnHost:
    """on_host_E: whose pairs the host computes; of the cut expert without its first cut_rows rows of F."""

    on_host_E: NDArray[np.bool_]
    cut_expert: int | None
    cut_rows: int


@dataclass(frozen=True, eq=False)
class Place:
    """experts: in the order of their rows."""

    experts: Experts


@dataclass(frozen=True, eq=False)
class Residents:
    """experts: by slot."""

    experts: Experts


@dataclass(frozen=True)
class Multiply:
    """The pieces at `places` of the buffer that the one task before this brings; none where nobody chose them."""

    places: tuple[int, ...]
    pieces: Pieces


@dataclass(frozen=True)
class Combine:
    pass


def prefill_schedule(
    load: Load,
    split: ExpertSplit,
    cost: CostModel,
    staging: Staging,
    slot_E: Experts,
    staged: Sequence[Pieces] = (),
) -> Schedule:
    """One layer by itself, as it is executed. Arguments: add_prefill."""
    builder = ScheduleBuilder()
    add_prefill(builder, load, split, cost, staging, slot_E, staged)
    return builder.build()


def add_prefill(
    builder: ScheduleBuilder,
    load: Load,
    split: ExpertSplit,
    cost: CostModel,
    staging: Staging,
    slot_E: Experts,
    staged: Sequence[Pieces] = (),
    after: Sequence[int] = (),
    layer: str = "",
) -> int:
    """Adds one layer's tasks, all of which come after those given; returns the position of its Combine.

    slot_E: -1 without a slot. staged: shipments fetched ahead, which have the first buffers; experts that have a slot
    by now are not read there. Fetches begin with the most loaded; the cut expert comes last. Where experts travel
    whole, each resource is as long busy as the split says. Loops are over experts that travel, and no others.
    """
    tokens_E, where_E, add, seconds = load.tokens_E, split.where_E, builder.add, _Seconds(load, cost)
    has_slot_E, on_host_E = slot_E >= 0, where_E == _HOST
    residents = np.flatnonzero((where_E == _RESIDENT) & has_slot_E)
    residents = residents[np.argsort(slot_E[residents], kind="stable")]
    fetched = np.flatnonzero(where_E == _FETCHED)
    fetched = fetched[np.argsort(-tokens_E[fetched], kind="stable")]
    cut = [] if split.cut_expert is None else [split.cut_expert]
    loads = staging.loads(fetched.tolist(), cost.shape.d_ffn)
    loads += [(piece,) for e in cut for piece in pieces_of(e, split.cut_rows, staging.piece_rows)]
    incoming = [*staged, *loads]
    from_staged = [_chosen(pieces, (where_E == _RESIDENT) & ~has_slot_E) for pieces in staged]
    reads = [*from_staged, *(Multiply(tuple(range(len(pieces))), pieces) for pieces in loads)]
    first, arrived, read = tuple(after), list[int](), list[int]()

    def fetch(limit: int = len(incoming)) -> None:
        """As far as there are buffers whose readers have been issued."""
        while len(arrived) < min(limit, len(incoming), staging.num_buffers + len(read)):
            pieces, before = incoming[len(arrived)], len(arrived) - staging.num_buffers
            waits = (*leads, read[before]) if before >= 0 else leads
            name = f"{layer}fetch {len(arrived)}"
            arrived.append(add(name, Resource.PCIE_UP, seconds.copy(pieces), waits, Fetch(pieces)))

    def multiply(i: int) -> None:
        name = f"{layer}multiply {i}"
        read.append(
            add(name, Resource.GPU, seconds.multiply(reads[i].pieces), (arrived[i], placed), reads[i])
        )
        fetch()

    for idx, left_s in enumerate(seconds.left(staged)):
        arrived.append(add(f"{layer}arriving {idx}", Resource.PCIE_UP, left_s, first, Arriving(idx)))
    if not staged and load.bus_busy_s > 0:
        add(f"{layer}bus busy", Resource.PCIE_UP, load.bus_busy_s, first)
    leads = (add(f"{layer}lead", Resource.LAUNCHES, split.lead_s, first),) if split.lead_s > 0 else first
    fetch(limit=len(staged) + 1)  # keeps the bus busy for longer than it takes to launch the host
    done = list(leads)
    if on_host_E.any():
        on_host = OnHost(on_host_E, split.cut_expert, split.cut_rows)
        name, share = f"{layer}host", split.host_memory_share
        done.append(add(name, Resource.HOST, split.host_s, first, on_host, share))
    fetch()
    ahead = [piece.expert_id for chosen in from_staged for piece in chosen.pieces]
    rows = np.concatenate([np.array(ahead, np.int64), residents, fetched, np.array(cut, np.int64)])
    placed = add(f"{layer}place", Resource.LAUNCHES, split.launch_s - split.lead_s, first, Place(rows))
    done.append(placed)
    for i in range(len(staged)):
        multiply(i)
    if len(residents):
        residents_s = seconds.residents(residents)
        done.append(add(f"{layer}residents", Resource.GPU, residents_s, (placed,), Residents(residents)))
    for i in range(len(staged), len(incoming)):
        multiply(i)
    return add(f"{layer}combine", Resource.GPU, 0.0, (*done, *read), Combine())


def _chosen(pieces: Pieces, is_read_E: NDArray[np.bool_]) -> Multiply:
    places = tuple(i for i, piece in enumerate(pieces) if is_read_E[piece.expert_id])
    return Multiply(places, tuple(pieces[i] for i in places))


class _Seconds:
    """Of tasks whose pieces are given; each alone on the machine."""

    def __init__(self, load: Load, cost: CostModel) -> None:
        self.busy_s, self.d_ffn, gpu = load.bus_busy_s, cost.shape.d_ffn, cost.gpu
        self.overhead_s, self.alpha_s = gpu.expert.overhead_s, gpu.h2d.alpha_s
        self.bytes_s = gpu.h2d.s_per_unit * cost.shape.expert_bytes
        self.work_E = cost.work_s(gpu.expert, load.tokens_E)
        self._work = self.work_E.tolist()  # numbers of NumPy are slow one by one

    def copy(self, pieces: Pieces) -> float:
        """Those of one task are equally large."""
        return len(pieces) * (self.alpha_s + self.bytes_s * self._share(pieces)) if pieces else 0.0

    def multiply(self, pieces: Pieces) -> float:
        work = self._work
        work_s: float = sum([work[piece.expert_id] for piece in pieces])
        return len(pieces) * self.overhead_s + self._share(pieces) * work_s if pieces else 0.0

    def residents(self, experts: Experts) -> float:
        return float(self.work_E[experts].sum()) + len(experts) * self.overhead_s

    def _share(self, pieces: Pieces) -> float:
        return pieces[0].num_rows / self.d_ffn

    def left(self, staged: Sequence[Pieces]) -> list[float]:
        """What is left of each shipment's copy: the bus has been at it in their order."""
        left_s, seconds = self.busy_s, list[float]()
        for pieces in reversed(staged):
            seconds.append(min(left_s, self.copy(pieces)))
            left_s -= seconds[-1]
        return seconds[::-1]
