"""Measure a layer's costs on the mesh it runs on: links, experts, gradients, and how they slow each other.

Every rank times the same things in the same order; what is fitted is the slowest rank's time, so all ranks get the
same profile to the last bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from monde.calibration.overlap import nearest_overlap
from monde.planning.fit import AlphaBeta, fit_alpha_beta
from monde.planning.profile import Overlap
from monde.planning.schedule import Resource
from monde.planning.training_profile import TrainingProfile
from monde.training.exchange import all_to_all
from monde.training.fabric import Fabric
from monde.training.layer import ShardedExperts

_REPEATS = 5
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the largest size


def profile_layer(experts: ShardedExperts, max_rows: int) -> TrainingProfile:
    """Costs for up to `max_rows` rows a node. Collective; takes a second or two. Weights' gradients are not touched."""
    fabric, spec = experts.fabric, experts.weights.spec
    dtype = next(experts.weights.parameters()).dtype
    row_bytes = spec.d_model * dtype.itemsize
    meter = _Meter(fabric)
    max_bytes = max_rows * row_bytes

    def link(group: Any) -> AlphaBeta | None:
        return (
            None
            if group is None
            else meter.fit([s * max_bytes for s in _SHARES], lambda b: _exchange(b, group, fabric))
        )

    def rows(share: float) -> int:
        return max(len(_SHARES) * experts.weights.spec.num_experts, int(share * max_rows))

    forward_s, backward_s = [], []
    sizes = [rows(share) for share in _SHARES]
    for size in sizes:
        forward, backward = _experts(experts, size, dtype)
        forward_s.append(meter.seconds(forward))
        backward_s.append(meter.seconds(backward))
    inter, intra = link(fabric.inter), link(fabric.intra)
    compute = _experts(experts, sizes[-1], dtype)[0]
    lanes = {
        Resource.LINK_INTER: _exchange(max_bytes, fabric.inter, fabric),
        Resource.LINK_INTRA: _exchange(max_bytes, fabric.intra, fabric),
    }
    return TrainingProfile(
        num_nodes=fabric.num_nodes,
        num_local=fabric.num_local,
        row_bytes=row_bytes,
        forward=fit_alpha_beta(sizes, forward_s),
        backward=fit_alpha_beta(sizes, backward_s),
        inter=inter,
        intra=intra,
        all_reduce=_all_reduce(meter, fabric, max_bytes // 4),
        compute_inter=Overlap() if inter is None else meter.overlap(compute, Resource.LINK_INTER, lanes),
        compute_intra=Overlap() if intra is None else meter.overlap(compute, Resource.LINK_INTRA, lanes),
        inter_intra=Overlap()
        if inter is None or intra is None
        else meter.overlap(None, Resource.LINK_INTRA, lanes),
    )


Action = Callable[[], None]


class _Meter:
    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric

    def agreed(self, seconds_s: float) -> float:
        """The slowest rank's."""
        value = torch.tensor([seconds_s], dtype=torch.float64, device=self.fabric.device)
        if self.fabric.everyone is not None:
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.fabric.everyone)
        return float(value)

    def seconds(self, action: Action) -> float:
        """Median of a few, after one to warm up; ranks start together."""
        samples = []
        for _ in range(_REPEATS + 1):
            self.agreed(0.0)
            samples.append(self.agreed(self._timed(action)))
        return statistics.median(samples[1:])

    def _timed(self, action: Action) -> float:
        self._synchronize()
        start_s = time.perf_counter()
        action()
        self._synchronize()
        return time.perf_counter() - start_s

    def _synchronize(self) -> None:
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize()

    def fit(self, sizes: list[float], action_of: Callable[[float], Action]) -> AlphaBeta:
        return fit_alpha_beta(sizes, [self.seconds(action_of(size)) for size in sizes])

    def overlap(self, first: Action | None, link: Resource, exchanges: dict[Resource, Action]) -> Overlap:
        """`first` (None: the exchange between nodes) beside the exchange on `link`: each timed while the other repeats."""
        other = Resource.LINK_INTER
        lane = self.fabric.lanes[link]
        here = first if first is not None else exchanges[other]
        alone = (self.seconds(here), self.seconds(exchanges[link]))
        # Enough of the one that repeats to outlast five of the one that is timed.
        num_links = 2 + int(2 * _REPEATS * alone[0] / alone[1])
        num_here = 2 + int(2 * _REPEATS * alone[1] / alone[0])
        tickets = [lane.submit("repeat", exchanges[link]) for _ in range(num_links)]
        first_s = statistics.median(self._timed(here) for _ in range(_REPEATS))
        for ticket in tickets:
            ticket.wait()
        self.agreed(0.0)
        samples: list[float] = []
        tickets = [
            lane.submit("timed", lambda: samples.append(self._timed(exchanges[link])))
            for _ in range(_REPEATS)
        ]
        for _ in range(num_here):
            here()
        for ticket in tickets:
            ticket.wait()
        second_s = statistics.median(samples)
        return nearest_overlap(self.agreed(first_s) / alone[0], self.agreed(second_s) / alone[1])


def _exchange(num_bytes: float, group: Any, fabric: Fabric) -> Action:
    """An even all-to-all by which a rank sends `num_bytes` to others."""
    if group is None:
        return lambda: None
    size = dist.get_world_size(group)
    each = max(1, int(num_bytes / 4 / (size - 1)))
    x_RD = torch.zeros(each * size, 1, device=fabric.device)
    splits = [each] * size
    return lambda: _drop(all_to_all(x_RD, splits, splits, group))


def _all_reduce(meter: _Meter, fabric: Fabric, max_elements: int) -> AlphaBeta | None:
    if fabric.reducing is None:
        return None
    sizes = [max(1, int(share * max_elements)) for share in _SHARES]

    def action_of(size: float) -> Action:
        x = torch.zeros(int(size), device=fabric.device)
        return lambda: dist.all_reduce(x, group=fabric.reducing) and None

    return meter.fit([float(size) for size in sizes], action_of)


def _experts(experts: ShardedExperts, num_rows: int, dtype: torch.dtype) -> tuple[Action, Action]:
    """Forward and backward of this rank's experts on rows spread evenly."""
    weights = experts.weights
    num_experts = weights.expert_range.stop - weights.expert_range.start
    w = {name: tensor.detach() for name, tensor in weights.weights().items()}
    counts_E = [num_rows * (e + 1) // num_experts - num_rows * e // num_experts for e in range(num_experts)]
    x_RD = torch.randn(sum(counts_E), weights.spec.d_model, device=weights.fabric.device).to(dtype)

    def forward() -> None:
        with torch.no_grad():
            weights(x_RD, counts_E, w)

    with torch.no_grad():
        saved = weights(x_RD, counts_E, w)[1]
    grads = {name: torch.zeros_like(tensor) for name, tensor in w.items()}

    def backward() -> None:
        with torch.no_grad():
            weights.backward(x_RD, saved, counts_E, w, grads)

    return forward, backward


def _drop(_: Tensor) -> None:
    pass
