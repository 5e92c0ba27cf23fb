"""Gradients of what every rank holds alike, summed over ranks: in slices beside the backward of the layers, or at once.

Losses add up over ranks (each divides by the tokens of all), so gradients are summed, not averaged. Experts' gradients
need nothing: all tokens of all ranks have been through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from monde.planning.schedule import Resource
from monde.training.fabric import Fabric
from monde.training.lanes import Action, Ticket
from monde.training.layer import ShardedExperts
from monde.training.overlap import Slices


@dataclass
class Bucket:
    """One flat buffer; parameters' gradients are views of it, in about the order in which backward makes them."""

    flat: Tensor
    params: list[nn.Parameter]
    ends: list[int]
    ready: set[int] = field(default_factory=set)  # positions in params
    num_issued: int = 0

    def ready_end(self) -> int:
        """How far every gradient from the start is final."""
        for position in range(len(self.params)):
            if position not in self.ready:
                return self.ends[position - 1] if position else 0
        return self.ends[-1]


class GradientReducer:
    """beside[l], after[l]: elements to reduce beside the backward of the l-th layer of experts (in order of forward),
    and right after it; what is not planned, or not final by then, is reduced by `finish`. No plan: all at the end.

    begin() before every backward, finish() after it and before the optimizer.
    """

    def __init__(self, model: nn.Module, fabric: Fabric) -> None:
        self.fabric = fabric
        self.layers = [m for m in model.modules() if isinstance(m, ShardedExperts)]
        self.ready_elements = [0] * len(self.layers)  # by layer: gradients final when its backward began
        self._tickets: list[Ticket] = []
        own = {id(p) for layer in self.layers for p in layer.weights.parameters()}
        shared = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        self.buckets = [
            _bucket([p for p in reversed(shared) if p.dtype is dtype], self)
            for dtype in dict.fromkeys(p.dtype for p in shared)
        ]
        self.plan_slices((), ())
        for position, layer in enumerate(self.layers):
            layer.slices = partial(self._slices, position)

    @property
    def num_elements(self) -> int:
        return sum(bucket.flat.numel() for bucket in self.buckets)

    def plan_slices(self, beside: Sequence[int], after: Sequence[int]) -> None:
        """Errors: ValueError unless each has one number for each layer, or none at all."""
        for plan in (beside, after):
            if plan and len(plan) != len(self.layers):
                raise ValueError(
                    f"plan_slices: expected one number for each of {len(self.layers)} layers, got {len(plan)}"
                )
        nothing = [0] * len(self.layers)
        self.beside, self.after = list(beside) or nothing, list(after) or nothing

    def begin(self) -> None:
        """Gradients to zero, as views of the buckets. In place of optimizer.zero_grad()."""
        for bucket in self.buckets:
            bucket.flat.zero_()
            bucket.ready.clear()
            bucket.num_issued = 0
            for param, end in zip(bucket.params, bucket.ends, strict=True):
                param.grad = bucket.flat[end - param.numel() : end].view_as(param)
        for layer in self.layers:
            for param in layer.weights.parameters():
                param.grad = None

    def _slices(self, position: int) -> Slices:
        self.ready_elements[position] = sum(bucket.ready_end() for bucket in self.buckets)
        if self.fabric.reducing is None:
            return Slices()
        beside, after = (self._take(plan[position]) for plan in (self.beside, self.after))
        return Slices(beside, after, self._tickets.extend)

    def _take(self, num_elements: int) -> list[Action]:
        actions: list[Action] = []
        for bucket in self.buckets:
            take = min(num_elements, bucket.ready_end() - bucket.num_issued)
            if take > 0:
                actions.append(self._reduce(bucket, take))
                num_elements -= take
        return actions

    def _reduce(self, bucket: Bucket, num_elements: int) -> Action:
        part = bucket.flat[bucket.num_issued : bucket.num_issued + num_elements]
        bucket.num_issued += num_elements
        return lambda: dist.all_reduce(part, group=self.fabric.reducing) and None

    def finish(self) -> None:
        """All gradients are sums over ranks when this returns (on CUDA: for the current stream)."""
        if self.fabric.reducing is not None:
            lane = self.fabric.lanes[Resource.LINK_INTER]
            for bucket in self.buckets:
                rest = bucket.flat.numel() - bucket.num_issued
                if rest:
                    self._tickets.append(lane.submit("gradients", self._reduce(bucket, rest)))
        for ticket in self._tickets:
            ticket.wait()
        self._tickets.clear()


def _bucket(params: list[nn.Parameter], reducer: GradientReducer) -> Bucket:
    sizes = torch.tensor([p.numel() for p in params])
    bucket = Bucket(params[0].new_zeros(int(sizes.sum())), params, sizes.cumsum(0).tolist())
    for position, param in enumerate(params):
        param.register_post_accumulate_grad_hook(lambda _, position=position: bucket.ready.add(position))
    return bucket


def clip_gradients(model: nn.Module, fabric: Fabric, max_norm: float) -> float:
    """Scale all gradients so that their norm over all ranks is at most max_norm; the norm before. Collective.

    After GradientReducer.finish.
    """
    layers = [m for m in model.modules() if isinstance(m, ShardedExperts)]
    own = {id(p): name for layer in layers for name, p in layer.weights.weights().items()}
    grads = [(own.get(id(p)), p.grad) for p in model.parameters() if p.grad is not None]
    squares = torch.zeros(2, dtype=torch.float64, device=fabric.device)
    for name, grad in grads:
        # Replicas count once: dense parameters on the first rank, down_bias on one slice of F.
        is_counted = fabric.is_first if name is None else name != "down_bias" or fabric.local_idx == 0
        if is_counted:
            squares[0] += grad.double().square().sum()
    norm = float(fabric.sum_over_ranks(squares)[0].sqrt())
    if norm > max_norm:
        for _, grad in grads:
            grad.mul_(max_norm / norm)
    return norm
