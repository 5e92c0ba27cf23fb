"""Swaps where host memory has no copy of residents: the one that leaves its slot goes back to the host first.

    start    expert_out's bytes to a free place, on the copy stream and after all that the compute stream has by then
    finish   when these have arrived, the host knows the place, and the swap itself begins (mover): expert_out's table
             entry becomes -1, expert_in's bytes leave for the slot; then expert_in's entry; and when all that was
             launched before that is done, expert_in's place is free

So a slot is overwritten only when its expert is whole on the host, a place only when nobody can read it, and at any
time every expert is whole in a slot or a place that its tables name. Nothing is read from the checkpoint: slots and
places hold the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from monde.device.copies import Arrival, Copies
from monde.executors.mover import SlotMover
from monde.planning.placement import Swap
from monde.weights.host import HostBlobs
from monde.weights.places import PlaceTable
from monde.weights.slots import ExpertSlots


class ExchangeMover:
    """As SlotMover, which it uses. places: by layer index. A part that fails is tried again by the next `finish`."""

    def __init__(
        self,
        mover: SlotMover,
        slots: Mapping[int, ExpertSlots],
        places: Mapping[int, PlaceTable],
        blobs: Mapping[int, HostBlobs],
        copies: Copies,
    ) -> None:
        self._mover, self._slots, self._places, self._blobs, self._copies = (
            mover,
            slots,
            places,
            blobs,
            copies,
        )
        self._swaps: Sequence[Swap] = ()
        self._taken: Sequence[int] = ()  # place of each swap's expert_out, until it has entered
        self._returning: Arrival | None = None
        self._flipped: Arrival | None = None

    @property
    def is_busy(self) -> bool:
        return bool(self._swaps)

    @property
    def num_free(self) -> int:
        """Swaps that can be made at once, whatever their layers."""
        return min(len(table.pool.free) for table in self._places.values())

    def start(self, swaps: Sequence[Swap]) -> None:
        assert not self.is_busy
        taken = [self._places[swap.layer].pool.take() for swap in swaps]
        pairs = [
            (self._blobs[swap.layer].run_B(place, 1), self._slots[swap.layer].blobs_SB[swap.slot])
            for swap, place in zip(swaps, taken, strict=True)
        ]
        try:
            self._returning = self._copies.from_device(pairs)
        except BaseException:
            for swap, place in zip(swaps, taken, strict=True):
                self._places[swap.layer].pool.give_back(place)
            raise
        self._swaps, self._taken = swaps, taken

    def finish(self) -> Sequence[Swap]:
        """The swaps that are complete as of now: all that were started, or none."""
        if self._returning is not None:
            if not self._returning.done():
                return ()
            for swap, place in zip(self._swaps, self._taken, strict=True):
                self._places[swap.layer].enter(swap.expert_out, place)
            self._returning, self._taken = None, ()
        if self._flipped is None:
            if self._swaps and not self._mover.is_busy:
                self._mover.start(self._swaps)
                return ()
            done = self._mover.finish()
            if done:
                self._flipped = self._copies.launched()
            return done
        if self._flipped.done():
            for swap in self._swaps:
                self._places[swap.layer].leave(swap.expert_in)
            self._swaps, self._flipped = (), None
        return ()

    def close(self) -> None:
        self._mover.close()
