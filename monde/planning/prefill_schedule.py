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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monde.planning.cost import CostModel
from monde.planning.schedule import Resource, Schedule, ScheduleBuilder, Task
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
    """on_host_E: whose pairs the host computes besides those it has begun on, nobody's maybe; of the cut expert without
    its first cut_rows rows of F."""

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
    """One layer by itself, as it is executed. Arguments: PrefillTasks."""
    builder = ScheduleBuilder()
    PrefillTasks(builder, load, split, cost, staging, slot_E, staged).add()
    return builder.build()


class PrefillTasks:
    """One layer's tasks, added to a builder in two parts: `begin` has what the bus and the host start on, `end` what the
    GPU multiplies. The executor does the first part before it makes the second.

    All of them come after those given. slot_E: -1 without a slot. staged: shipments fetched ahead, which have the first
    buffers; experts that have a slot by now are not read there. Fetches begin with the most loaded; the cut expert
    comes last. Where experts travel whole, each resource is as long busy as the split says. Loops are over experts that
    travel, and no others.
    """

    def __init__(
        self,
        builder: ScheduleBuilder,
        load: Load,
        split: ExpertSplit,
        cost: CostModel,
        staging: Staging,
        slot_E: Experts,
        staged: Sequence[Pieces] = (),
        after: Sequence[int] = (),
        layer: str = "",
    ) -> None:
        self._builder, self._load, self._split, self._staging = builder, load, split, staging
        self._slot_E, self._staged, self._layer = slot_E, staged, layer
        self._seconds = _Seconds(load, cost)
        fetched = np.flatnonzero(split.where_E == _FETCHED)
        self._fetched = fetched[np.argsort(-load.tokens_E[fetched], kind="stable")]
        self._cut = [] if split.cut_expert is None else [split.cut_expert]
        loads = staging.loads(self._fetched.tolist(), cost.shape.d_ffn)
        loads += [(piece,) for e in self._cut for piece in pieces_of(e, split.cut_rows, staging.piece_rows)]
        self._incoming = [*staged, *loads]
        self._first, self._leads = tuple(after), tuple(after)
        self._done, self._arrived, self._read = list[int](), list[int](), list[int]()

    def add(self) -> int:
        """Both parts; the position of the Combine."""
        self.begin()
        return self.end()

    def in_order(self) -> Iterator[tuple[int, Task]]:
        """(position, task), of a builder that had none; the second part is made when it is asked for."""
        tasks = self._builder.tasks
        self.begin()
        yield from enumerate(tuple(tasks))
        num_begun = len(tasks)
        self.end()
        yield from enumerate(tasks[num_begun:], num_begun)

    def begin(self) -> None:
        split, load, first = self._split, self._load, self._first
        for idx, left_s in enumerate(self._seconds.left(self._staged)):
            self._arrived.append(self._add(f"arriving {idx}", Resource.PCIE_UP, left_s, first, Arriving(idx)))
        if not self._staged and load.bus_busy_s > 0:
            self._add("bus busy", Resource.PCIE_UP, load.bus_busy_s, first)
        if split.lead_s > 0:
            self._leads = (self._add("lead", Resource.LAUNCHES, split.lead_s, first),)
        # One keeps the bus busy for longer than it takes to launch the host, and so may what was fetched ahead.
        num_staged, incoming = len(self._staged), self._incoming
        if len(incoming) > num_staged and load.bus_busy_s < self._seconds.copy(incoming[num_staged]):
            self._fetch(limit=num_staged + 1)
        self._done.extend(self._leads)
        on_host_E = split.where_E == _HOST
        if on_host_E.any():
            if load.begun_E is not None:
                on_host_E &= ~load.begun_E
            on_host = OnHost(on_host_E, split.cut_expert, split.cut_rows)
            host = self._add("host", Resource.HOST, split.host_s, first, on_host, split.host_memory_share)
            self._done.append(host)
        self._fetch(limit=len(self._incoming))

    def end(self) -> int:
        """The position of the Combine."""
        where_E, slot_E, staged = self._split.where_E, self._slot_E, self._staged
        is_resident_E, has_slot_E = where_E == _RESIDENT, slot_E >= 0
        residents = np.flatnonzero(is_resident_E & has_slot_E)
        residents = residents[np.argsort(slot_E[residents], kind="stable")]
        reads = [_chosen(pieces, is_resident_E & ~has_slot_E) for pieces in staged]
        ahead = [piece.expert_id for chosen in reads for piece in chosen.pieces]
        reads += [Multiply(tuple(range(len(pieces))), pieces) for pieces in self._incoming[len(staged) :]]
        rows = np.concatenate(
            [np.array(ahead, np.int64), residents, self._fetched, np.array(self._cut, np.int64)]
        )
        launch_s = self._split.launch_s - self._split.lead_s
        placed = self._add("place", Resource.LAUNCHES, launch_s, self._first, Place(rows))
        self._done.append(placed)
        for i, multiply in enumerate(reads[: len(staged)]):
            self._multiply(i, multiply, placed)
        if len(residents):
            seconds_s = self._seconds.residents(residents)
            task = self._add("residents", Resource.GPU, seconds_s, (placed,), Residents(residents))
            self._done.append(task)
        for i, multiply in enumerate(reads[len(staged) :], len(staged)):
            self._multiply(i, multiply, placed)
        return self._add("combine", Resource.GPU, 0.0, (*self._done, *self._read), Combine())

    def _fetch(self, limit: int) -> None:
        """As far as there are buffers whose readers have been issued."""
        arrived, read, num_buffers = self._arrived, self._read, self._staging.num_buffers
        while len(arrived) < min(limit, len(self._incoming), num_buffers + len(read)):
            pieces, before = self._incoming[len(arrived)], len(arrived) - num_buffers
            waits = (*self._leads, read[before]) if before >= 0 else self._leads
            seconds_s = self._seconds.copy(pieces)
            arrived.append(
                self._add(f"fetch {len(arrived)}", Resource.PCIE_UP, seconds_s, waits, Fetch(pieces))
            )

    def _multiply(self, i: int, multiply: Multiply, placed: int) -> None:
        seconds_s, waits = self._seconds.multiply(multiply.pieces), (self._arrived[i], placed)
        self._read.append(self._add(f"multiply {i}", Resource.GPU, seconds_s, waits, multiply))
        self._fetch(limit=len(self._incoming))

    def _add(
        self,
        name: str,
        resource: Resource,
        seconds_s: float,
        after: Sequence[int],
        payload: object = None,
        memory_share: float = 1.0,
    ) -> int:
        return self._builder.add(self._layer + name, resource, seconds_s, after, payload, memory_share)


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
