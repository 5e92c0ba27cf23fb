"""One mixture-of-experts layer, the whole story. Start reading here.

    few tokens on a GPU    decode: GPU and host at once, the GPU decides and nobody waits in Python
    many                   prefill: counts are read back, a plan is made; GPU, bus and host stream at once
    no slots, no GPU       the host computes all of it

Over ranks, and where pairs of a decode step are deferred, other classes stand in front of these layers.

Letters are explained in `monde.core`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from hostcompute import ExpertSpec
from monde.core import RoutedBatch
from monde.executors.decode import DecodeExecutor
from monde.executors.deferral import Deferred, DeferredSteps, Left
from monde.executors.host import HostExecutor
from monde.executors.prefill import PrefillExecutor
from monde.executors.ranked import RankedExecutor
from monde.routing.deferral import apart, check_topk
from monde.weights.table import SlotTable

_NO_TURN: AbstractContextManager[Any] = nullcontext()
_CLOSED = "model.monde.close() gave this model's experts back and closed it; load the model again"


class Watch(Protocol):
    """Whoever follows the routing of all layers."""

    def enter(self, layer_idx: int) -> None:
        """A layer is called; between two steps of the model is the time to change tables."""

    def routed(self, layer_idx: int, batch: RoutedBatch) -> None:
        """All pairs of a call."""

    def count(self, layer_idx: int, batch: RoutedBatch) -> None:
        """Pairs that the decode kernels do not count themselves."""


class MoELayer:
    """The experts of one layer. The model's own router has decided already; shared experts stay in the model.

    device is None where the model has no GPU, nor a CPU that stands in for one. `host` is present always, and holds
    the experts without a slot, or, where residents may change and memory allows, all; the table says, to everybody, who is resident.
    watch hears of every call as layer_idx.
    decoder gives the decode executor for a type of activations, or None where there cannot be one.
    turn: held during a call, where layers share what one call at a time may use; threads then take turns by layer.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        table: SlotTable,
        host: HostExecutor,
        device: PrefillExecutor | None = None,
        decoder: Callable[[torch.dtype], DecodeExecutor | None] = lambda x_dtype: None,
        layer_idx: int = 0,
        watch: Watch | None = None,
        turn: AbstractContextManager[Any] = _NO_TURN,
    ) -> None:
        self.turn = turn
        self.spec, self.table, self.host, self.device, self.decoder = spec, table, host, device, decoder
        self.layer_idx, self.watch = layer_idx, watch
        self.num_calls = 0
        self._is_closed = False

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """y_TD = sum over k of weight_Tk * expert[id_Tk](x_T), summed in fp32, rounded once to x's type.

        Errors: RuntimeError after close.
        """
        with self.turn:
            batch = RoutedBatch(x_TD, topk_ids_TK, topk_weights_TK)
            self.enter(batch)
            decode = self.decode_executor(batch)
            return self.compute(batch, x_TD.dtype) if decode is None else decode.forward(batch)

    def enter(self, batch: RoutedBatch) -> None:
        """A call of this layer begins."""
        self.check_open()
        self.num_calls += 1
        if self.watch is not None:
            self.watch.enter(self.layer_idx)
            self.watch.routed(self.layer_idx, batch)

    def decode_executor(self, batch: RoutedBatch) -> DecodeExecutor | None:
        """Who computes `batch` without a wait in Python; None: `compute` must."""
        return self.decoder(batch.x_TD.dtype) if DecodeExecutor.takes(batch) else None

    def compute(self, batch: RoutedBatch, y_dtype: torch.dtype) -> Tensor:
        """y_TD of `batch`, rounded once to y_dtype."""
        if self.watch is not None:
            self.watch.count(self.layer_idx, batch)
        return self.compute_unwatched(batch, y_dtype)

    def compute_unwatched(self, batch: RoutedBatch, y_dtype: torch.dtype) -> Tensor:
        """For batches that no router made, when this is timed: they heat no expert."""
        if self.device is not None:
            return self.device.forward(batch, y_dtype)
        return self.host.submit(batch, y_dtype).wait()

    def check_open(self) -> None:
        """Errors: RuntimeError after close."""
        if self._is_closed:
            raise RuntimeError(_CLOSED)

    def close(self) -> None:
        """Give the host memory back."""
        self._is_closed = True
        self.host.bank.close()


class RankedLayer:
    """The experts of one layer over ranks. This rank's parts of them are layers of their own, with their own slots.

    Decode kernels are left out: they round to the type of the activations, and what travels is fp32.
    """

    def __init__(self, parts: Sequence[MoELayer], executor: RankedExecutor) -> None:
        self.parts, self.executor = parts, executor

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """As MoELayer.forward, of this rank's tokens; every rank calls it. Errors: RankError."""
        batch = RoutedBatch(x_TD, topk_ids_TK, topk_weights_TK)
        self.parts[0].enter(batch)
        return self.executor.forward(batch)


class DeferringLayer:
    """A layer that leaves pairs of a decode step to the next one (docs/deferral.md); all others as MoELayer.

    What a layer leaves is computed from its own input; it is added to the output of the next layer's experts.
    """

    def __init__(self, layer: MoELayer, steps: DeferredSteps) -> None:
        self.layer, self.steps = layer, steps

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """As MoELayer.forward. Errors: ValueError where so many pairs cannot be left, RuntimeError out of order."""
        layer, steps = self.layer, self.steps
        if not steps.enter(layer.layer_idx):
            return layer.forward(x_TD, topk_ids_TK, topk_weights_TK)
        batch, num_left = RoutedBatch(x_TD, topk_ids_TK, topk_weights_TK), steps.leaves(layer.layer_idx)
        check_topk(num_left, topk_ids_TK.shape[1])
        with layer.turn:
            layer.enter(batch)
            decode, earlier = layer.decode_executor(batch), steps.take()
            if decode is None:
                done = self._compute(batch, num_left, earlier)
            else:
                done = decode.forward_deferring(batch, num_left, earlier)
        steps.leave(done.left)
        return done.y_TD

    def _compute(self, batch: RoutedBatch, num_left: int, earlier: Left | None) -> Deferred:
        """Where Python waits for the host nothing can be hidden, so both halves are computed together."""
        halves = apart(batch, num_left) if num_left else batch
        y_TD, *left = self.layer.compute(halves, torch.float32).split(batch.x_TD.shape[0])
        if earlier is not None:
            y_TD = y_TD + earlier.whole_TD()
        return Deferred(y_TD.to(batch.x_TD.dtype), Left(left[0]) if left else None)


Front = MoELayer | RankedLayer | DeferringLayer  # what a model's modules call
