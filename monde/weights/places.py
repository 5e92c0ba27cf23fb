"""Where experts lie in host memory that does not hold all of them: places, and who has which.

Layers whose residents move without a copy on the host share places of one size. A place belongs to one expert, whose
bytes are in it, or is free: nobody reads it then. E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hostcompute import ExpertBank, ExpertSpec, HostPlaces, make_layout
from hostcompute.places import NOWHERE
from monde.core import Placement


class PlacePool:
    """Places of one size, taken and given back by the layers of one model."""

    def __init__(self, memory: HostPlaces) -> None:
        self.memory = memory
        self._free = list(reversed(range(memory.num_places)))

    @property
    def free(self) -> Sequence[int]:
        return tuple(self._free)

    def take(self) -> int:
        """Errors: AssertionError if none is free."""
        assert self._free, "no place is free"
        return self._free.pop()

    def give_back(self, place: int) -> None:
        """Only once nothing that may read it is under way."""
        assert place not in self._free, place
        self._free.append(place)


class PlaceTable:
    """place_of_expert_E, int32, where kernels look that read host memory; the bank has the same for the host.

    As with SlotTable its address stays, and changes are launched on the current stream. The bank sees them at once: so
    an expert enters before, and leaves after, the steps in which the host may compute it. Kernels look for experts
    without a slot only, so that the others' entries may be old ones.
    """

    def __init__(self, bank: ExpertBank, pool: PlacePool, placement: Placement, device: torch.device) -> None:
        """Experts without a slot get their places, for `ExpertBank.load` to fill."""
        self.bank, self.pool = bank, pool
        for expert_id, slot in enumerate(placement.slot_of_expert_E):
            if slot < 0:
                bank.place(expert_id, pool.take())
        self.place_of_expert_E = torch.tensor(bank.place_of_expert_E, dtype=torch.int32, device=device)

    def enter(self, expert_id: int, place: int) -> None:
        """Its bytes are in `place`, which was taken from the pool."""
        self.bank.place(expert_id, place, is_filled=True)
        self.place_of_expert_E[expert_id].fill_(place)

    def leave(self, expert_id: int) -> None:
        """It has a slot, and nothing that reads its place is under way: that is free from now on."""
        place = self.bank.place_of_expert_E[expert_id]
        self.bank.place(expert_id, NOWHERE)
        self.pool.give_back(place)


def place_pools(
    specs: Sequence[ExpertSpec], num_cold: Mapping[int, int], num_spare_places: int
) -> dict[int, PlacePool]:
    """By layer: places for so many experts without a slot, and spare ones for every size of experts."""
    layouts = {l: make_layout(specs[l]) for l in num_cold}
    of_size: dict[int, PlacePool] = {}
    for blob_bytes in {layout.blob_bytes for layout in layouts.values()}:
        same = [l for l, layout in layouts.items() if layout.blob_bytes == blob_bytes]
        num_places = sum(num_cold[l] for l in same) + num_spare_places
        of_size[blob_bytes] = PlacePool(HostPlaces(layouts[same[0]], num_places))
    return {l: of_size[layout.blob_bytes] for l, layout in layouts.items()}
