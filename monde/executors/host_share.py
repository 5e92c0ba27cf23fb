"""The host's share of a long prompt: activations down, native kernels, the sum up again. Nothing pageable.

start    rows, experts and weights leave for pinned memory, on the lane back
submit   when they are there, the host's threads start; the caller goes on launching
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
        self._late: list[tuple[PendingForward, Staging]] = []  # given up, and what they still write to

    def _new_staging(self) -> Staging:
        return Staging(pinned=self.lanes.device.type == "cuda")

    def _read(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of a device tensor in pinned memory; on the current stream, valid after it."""
        target = self._staging.view(name, tuple(tensor.shape), tensor.dtype)
        return target.copy_(tensor, non_blocking=True)

    def counts(self, num_experts: int) -> Tensor:
        """int64, in pinned memory, for the device to fill in; read before the next batch is counted."""
        return self._staging.view("counts", (num_experts,), torch.int64)

    def start(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, totals: HostTotals) -> Posted:
        """On the lane back: the tensors must outlive `there`."""
        with self.lanes.back.as_current():
            here = [self._read(n, t) for n, t in (("x", x_TD), ("ids", ids_TK), ("weights", weights_TK))]
        totals.d2h_bytes += sum(tensor.nbytes for tensor in here)
        return Posted(here[0], here[1], here[2], self.lanes.back.mark())

    def submit(
        self, bank: ExpertBank, posted: Posted, on_host_E: NDArray[np.bool_], cut: Cut | None
    ) -> PendingForward:
        """The host starts on the pairs of these experts. Waits for the batch to arrive, and for nothing else."""
        posted.there.wait()
        ids_TK = posted.ids_TK.numpy()
        ids_TK[...] = np.append(np.where(on_host_E, np.arange(len(on_host_E)), -1), -1)[ids_TK]
        y_TD = self._staging.view("y", tuple(posted.x_TD.shape), torch.float32)
        return bank.submit(posted.x_TD, posted.ids_TK, posted.weights_TK, out=y_TD, cut=cut)

    def wait(self, pending: PendingForward, layer_idx: int, totals: HostTotals) -> Answer:
        """Errors: RuntimeError naming the MoE layer that the host failed or was late for; the next call works."""
        self._late = [entry for entry in self._late if not entry[0].done()]
        if not pending.wait_for(self.deadline_s):
            # It may write to its arrays for as long as it likes: nobody else gets them.
            self._late.append((pending, self._staging))
            self._staging = self._new_staging()
            raise RuntimeError(
                f"monde: MoE layer {layer_idx}: the host did not answer within {self.deadline_s:g} s; call again"
            )
        try:
            y_TD: Tensor = pending.wait()
        except Exception as error:
            raise RuntimeError(f"monde: MoE layer {layer_idx}: {error}; call again") from error
        counts = pending.counts
        assert counts is not None
        totals.busy_s += pending.busy_s
        totals.num_pairs += counts.num_pairs
        totals.weight_bytes += counts.weight_bytes
        totals.h2d_bytes += y_TD.nbytes
        return Answer(y_TD, pending.busy_s)
