"""The host's share of a long prompt: activations down, native kernels, the sum up again. Nothing pageable.

start    rows leave for pinned memory, on the lane back, while pairs are counted
post     so do experts and weights
submit   when they are there, the host's threads start; the caller goes on launching. A second one goes on from there
wait     the answer, in pinned memory; an end is set to waiting
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hostcompute import Cut, ExpertBank, PendingForward
from monde.device.lanes import Lanes, Mark
from monde.executors.host import HostTotals
from monde.weights.staging import Staging


@dataclass(frozen=True)
class Posted:
    """A batch on its way to host memory; ids from [0, E], E for none."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    there: Mark


@dataclass(frozen=True)
class Answer:
    """y_TD in fp32, in pinned memory until the next batch is submitted, and what the host took for it."""

    y_TD: Tensor
    busy_s: float


class HostShare:
    """Shared by the layers of a model; one batch at a time."""

    def __init__(self, lanes: Lanes, deadline_s: float) -> None:
        self.lanes, self.deadline_s = lanes, deadline_s
        self._staging = self._new_staging()
        self._under_way: list[PendingForward] = []  # of the batch at hand
        # Given up, and what they still read and write.
        self._late: list[tuple[tuple[PendingForward, ...], Staging]] = []

    def _new_staging(self) -> Staging:
        return Staging(pinned=self.lanes.device.type == "cuda")

    def _read(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of a device tensor in pinned memory; on the current stream, valid after it."""
        target = self._staging.view(name, tuple(tensor.shape), tensor.dtype)
        return target.copy_(tensor, non_blocking=True)

    def counts(self, num_experts: int) -> Tensor:
        """int64, in pinned memory, for the device to fill in; read before the next batch is counted."""
        return self._staging.view("counts", (num_experts,), torch.int64)

    def start(self, x_TD: Tensor) -> Tensor:
        """The rows to be posted. On the lane back, after all that the main lane has: x_TD must outlive `there`."""
        self.lanes.back.after(self.lanes.main.mark())
        with self.lanes.back.as_current():
            return self._read("x", x_TD)

    def post(
        self, rows_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, known: Mark, totals: HostTotals
    ) -> Posted:
        """The rest, on the lane back after `known`: the tensors must outlive `there`."""
        self.lanes.back.after(known)
        with self.lanes.back.as_current():
            here = (rows_TD, self._read("ids", ids_TK), self._read("weights", weights_TK))
        totals.d2h_bytes += sum(tensor.nbytes for tensor in here)
        return Posted(*here, self.lanes.back.mark())

    def submit(
        self,
        bank: ExpertBank,
        posted: Posted,
        on_host_E: NDArray[np.bool_],
        cut: Cut | None = None,
    ) -> None:
        """The host starts on the pairs of these experts, and adds to what the batch's submit before computes, if any.

        Waits for the batch to arrive, and for nothing else.
        """
        adds = bool(self._under_way)
        if not adds:
            posted.there.wait()
        self._under_way.append(self._submit(bank, posted, on_host_E, cut, adds))

    def _submit(
        self, bank: ExpertBank, posted: Posted, on_host_E: NDArray[np.bool_], cut: Cut | None, adds: bool
    ) -> PendingForward:
        ids_TK = posted.ids_TK
        y_TD = self._staging.view("y", tuple(posted.x_TD.shape), torch.float32)
        if bank.choice.name == "native":
            return bank.submit(posted.x_TD, ids_TK, posted.weights_TK, y_TD, cut, on_host_E, adds)
        assert cut is None  # nothing is fetched from other banks, so nothing is planned
        assert not adds
        chosen = np.append(np.where(on_host_E, np.arange(len(on_host_E)), -1), -1)[ids_TK.numpy()]
        return bank.submit(posted.x_TD, chosen, posted.weights_TK, y_TD)

    def give_up(self) -> None:
        """What is under way may use its arrays for as long as it likes: nobody else gets them."""
        self._late = [entry for entry in self._late if not all(one.done() for one in entry[0])]
        if self._under_way:
            self._late.append((tuple(self._under_way), self._staging))
            self._staging, self._under_way = self._new_staging(), []

    def wait(self, layer_idx: int, totals: HostTotals) -> Answer | None:
        """Of all submits of the batch; None where there was none.

        Errors: RuntimeError naming the MoE layer that the host failed or was late for; the next call works.
        """
        pending = self._under_way
        if not pending:
            return None
        if not all(one.wait_for(self.deadline_s) for one in pending):
            self.give_up()
            raise RuntimeError(
                f"monde: MoE layer {layer_idx}: the host did not answer within {self.deadline_s:g} s; call again"
            )
        try:
            y_TD: Tensor = [one.wait() for one in pending][-1]
        except Exception as error:
            raise RuntimeError(f"monde: MoE layer {layer_idx}: {error}; call again") from error
        self._under_way = []
        for one in pending:
            assert one.counts is not None
            totals.num_pairs += one.counts.num_pairs
            totals.weight_bytes += one.counts.weight_bytes
        busy_s = sum(one.busy_s for one in pending)
        totals.busy_s += busy_s
        totals.h2d_bytes += y_TD.nbytes
        return Answer(y_TD, busy_s)
