"""Experts into slots while the model runs: decides nothing, waits for nothing, overwrites nothing that is read.

    start    the evicted expert's table entry becomes -1, on the compute stream
             then, on the copy stream and after all that the compute stream has by then, the new expert's bytes
    finish   when these have arrived, the new expert's table entry, on the compute stream

In between neither expert has a slot and the host computes both, for it holds all experts of such a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from monde.device.copies import Arrival, Copies
from monde.planning.placement import Swap
from monde.weights.host import HostBlobs
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable


class SlotMover:
    """Moves experts of all layers of one model, one round of swaps at a time.

    slots and blobs by layer index; layers that cannot swap are absent. Not while the current stream is captured.
    """

    def __init__(
        self,
        tables: Sequence[SlotTable],
        slots: dict[int, ExpertSlots],
        blobs: dict[int, HostBlobs],
        copies: Copies,
    ) -> None:
        self._tables, self._slots, self._blobs, self._copies = tables, slots, blobs, copies
        self._swaps: Sequence[Swap] = ()
        self._arrival: Arrival | None = None

    @property
    def is_busy(self) -> bool:
        return bool(self._swaps)

    def start(self, swaps: Sequence[Swap]) -> None:
        assert not self.is_busy
        self._swaps = swaps
        self._leave()

    def _leave(self) -> None:
        for swap in self._swaps:
            self._tables[swap.layer].vacate(swap.expert_out)
        self._arrival = self._copies.to_device([pair for swap in self._swaps for pair in self._pairs(swap)])

    def finish(self) -> Sequence[Swap]:
        """The swaps that are complete as of now: all that were started, or none.

        Copies that could not be launched are tried again, for their slots are empty.
        """
        if self._swaps and self._arrival is None:
            self._leave()
        if self._arrival is None or not self._arrival.done():
            return ()
        self._arrival.order()
        for swap in self._swaps:
            self._tables[swap.layer].occupy(swap.expert_in, swap.slot)
        done, self._swaps, self._arrival = self._swaps, (), None
        return done

    def _pairs(self, swap: Swap) -> list[tuple[Tensor, Tensor]]:
        slots, blobs = self._slots[swap.layer], self._blobs[swap.layer]
        biases = blobs.biases(swap.expert_in)
        return [
            (slots.blobs_SB[swap.slot], blobs.blob_B(swap.expert_in)),
            *((slots.biases[role][swap.slot], bias_N) for role, bias_N in biases.items()),
        ]

    def close(self) -> None:
        self._copies.close()
