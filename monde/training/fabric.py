"""The ranks that share a layer's experts: their places, their process groups, and a lane for each link.

A mesh of one dim is expert parallelism over it. A mesh of two is ("node", "local"): experts are spread over nodes and
cut along F inside a node. Every rank has tokens of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from monde.device.mesh import ExchangeFailed
from monde.device.notices import Notice, Notices, break_off, is_of_a_backend, one_line
from monde.planning.pipeline import COMPUTE, GRADIENTS
from monde.planning.schedule import Resource
from monde.planning.training_profile import Observation
from monde.training.lanes import Lane, Stamp, make_lane

TIMEOUT = timedelta(minutes=5)
T = TypeVar("T")


class Fabric:
    """N nodes of L ranks; this rank is (node_idx, local_idx). mesh None: one process.

    Creating one is collective. inter: between nodes, ranks of equal local_idx. intra: inside a node. everyone: all
    ranks of the mesh; reducing: the same ranks, for gradients. A group is None where it would hold this rank only.
    timeout: after which a collective raises on ranks that wait for one that does not come.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None,
        *,
        timeout: timedelta = TIMEOUT,
        device: torch.device | None = None,
    ) -> None:
        self.mesh = mesh
        self.num_nodes, self.num_local, self.node_idx, self.local_idx = 1, 1, 0, 0
        self.everyone: Any = None
        self.reducing: Any = None
        self.inter: Any = None
        self.intra: Any = None
        self.lanes: dict[Resource, Lane] = {}
        self.observations: list[Observation] | None = None  # a list: every use of a layer is noted in it
        self._stamps: list[Stamp] | None = None
        self._ended_s = 0.0
        self._notices: Notices | None = None
        if mesh is None:
            self.device = device or torch.device("cpu")
            return
        if mesh.ndim > 2:
            raise ValueError(
                f"mesh: expected one dim, or two (node, local), got {mesh.ndim}; pass a slice, as in mesh['node', 'local']"
            )
        ranks_NL = mesh.mesh.reshape(mesh.mesh.shape[0], -1)
        self.num_nodes, self.num_local = ranks_NL.shape
        place = (ranks_NL == dist.get_rank()).nonzero()
        if len(place) != 1:
            raise ValueError(
                f"mesh: rank {dist.get_rank()} is not in it; run one rank for each place of the mesh"
            )
        self.node_idx, self.local_idx = (int(i) for i in place[0])
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if mesh.device_type == "cuda"
            else torch.device("cpu")
        )
        # Groups of our own: one lane issues into each, so no two threads share a group.
        self.everyone = self._own([ranks_NL.flatten().tolist()], timeout)
        # Before groups that suit one shape only: ranks of other shapes would wait in them, or take rows for others'.
        self.must_agree("the mesh", ranks_NL.tolist())
        self.reducing = self._own([ranks_NL.flatten().tolist()], timeout)
        self.inter = self._own(ranks_NL.t().tolist(), timeout)
        self.intra = self._own(ranks_NL.tolist(), timeout)
        if self.everyone is not None:
            self._notices = Notices(self.everyone, self.node_idx * self.num_local + self.local_idx)
        self.lanes = {r: make_lane(r, self.device) for r in (Resource.LINK_INTER, Resource.LINK_INTRA)}

    def _own(self, partition: list[list[int]], timeout: timedelta) -> Any:
        if len(partition[0]) == 1:
            return None
        group, _ = dist.new_subgroups_by_enumeration(partition, timeout=timeout)
        return group

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.num_local

    @contextmanager
    def observed(self, direction: str, degree: int, busiest_rows: int) -> Iterator[None]:
        """One way through a layer; noted, with the seconds of its stages on this rank, if somebody wants to know."""
        if self.observations is None or self.device.type == "cuda":
            yield
            return
        begin_s = time.perf_counter()
        if self.observations:
            last = self.observations[-1]
            self.observations[-1] = replace(last, idle_after_s=begin_s - self._ended_s)
        self._stamps = []
        for lane in self.lanes.values():
            lane.stamps = self._stamps
        yield
        seconds_s: dict[str, float] = {}
        for stamp in self._stamps:
            if not stamp.name.startswith(GRADIENTS):
                stage = stamp.name.split()[0]
                seconds_s[stage] = seconds_s.get(stage, 0.0) + stamp.end_s - stamp.start_s
        self._ended_s = time.perf_counter()
        total_s = self._ended_s - begin_s
        self.observations.append(Observation(direction, degree, busiest_rows, seconds_s, total_s))
        self._stamps = None
        for lane in self.lanes.values():
            lane.stamps = None

    @contextmanager
    def telling(self) -> Iterator[None]:
        """A step. What is raised in here on one rank ends the others' waits at once; nothing works afterwards.

        Errors: ExchangeFailed naming the rank and its error, where another failed; what was raised where this one did.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self._notices is None:
                raise
            told = [n for n in self._notices.of_others(self.num_ranks) if n.failed_rank is not None]
            if not told:
                rank = self.node_idx * self.num_local + self.local_idx
                # What a backend raises is another rank's doing.
                self._notices.post(Notice(None, None if is_of_a_backend(error) else rank, one_line(error)))
            for group in (self.everyone, self.reducing, self.inter, self.intra):
                break_off(group)
            if told:
                raise ExchangeFailed(f"rank {told[0].failed_rank} failed: {told[0].text}") from error
            raise

    def compute(self, name: str, action: Callable[[], None]) -> None:
        """A task of the compute stream, here."""
        start_s = time.perf_counter()
        action()
        if self._stamps is not None:
            self._stamps.append(Stamp(name, COMPUTE, start_s, time.perf_counter()))

    def gather_counts(self, counts_V: Tensor) -> Tensor:
        """Every rank's row of int64 numbers, on the host: [N, L, V]. The one place where a layer waits."""
        rows_WV = counts_V.new_empty(self.num_ranks, counts_V.numel())
        if self.everyone is None:
            rows_WV[0] = counts_V
        else:
            dist.all_gather(list(rows_WV), counts_V.contiguous(), group=self.everyone)
        return rows_WV.cpu().view(self.num_nodes, self.num_local, -1)

    @property
    def is_first(self) -> bool:
        return self.node_idx == self.local_idx == 0

    def sum_over_ranks(self, values_N: Tensor) -> Tensor:
        """In place, and returned."""
        if self.everyone is not None:
            dist.all_reduce(values_N, group=self.everyone)
        return values_N

    def first_does(self, action: Callable[[], None]) -> None:
        """On the first rank only; all wait for it. An OSError or ValueError there is raised on all."""
        failure: list[object] = [None]
        if self.is_first:
            try:
                action()
            except (OSError, ValueError) as error:
                failure = [error]
        if self.everyone is not None:
            dist.broadcast_object_list(failure, dist.get_global_rank(self.everyone, 0), group=self.everyone)
        if isinstance(failure[0], BaseException):
            raise failure[0]

    def all_do(self, action: Callable[[], T]) -> T:
        """On every rank. Collective: an OSError or ValueError on any is raised on all, that of the first rank with one."""
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except (OSError, ValueError) as error:
            failure = error
        failures: list[Exception | None] = [failure]
        if self.everyone is not None:
            failures = [None] * self.num_ranks
            dist.all_gather_object(failures, failure, group=self.everyone)
        for one in failures:
            if one is not None:
                raise one
        return cast("T", result)

    def must_agree(self, what: str, value: object) -> None:
        """Errors: ValueError on every rank when `value` differs between ranks."""
        if self.everyone is None:
            return
        values: list[object] = [None] * self.num_ranks
        dist.all_gather_object(values, repr(value), group=self.everyone)
        if len(set(values)) > 1:
            listed = "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(values))
            raise ValueError(f"{what} differs between ranks ({listed}); give all ranks the same")

    def copy_from_first(self, tensor: Tensor) -> None:
        """In place: the values of the mesh's first rank."""
        if self.everyone is not None:
            dist.broadcast(tensor.detach(), dist.get_global_rank(self.everyone, 0), group=self.everyone)

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.close()


_FABRICS: WeakKeyDictionary[DeviceMesh, Fabric] = WeakKeyDictionary()


def fabric_of(mesh: DeviceMesh | Fabric | None) -> Fabric:
    """The mesh's one fabric: layers share its groups and lanes."""
    if isinstance(mesh, Fabric):
        return mesh
    if mesh is None:
        return Fabric(None)
    if mesh not in _FABRICS:
        _FABRICS[mesh] = Fabric(mesh)
    return _FABRICS[mesh]
