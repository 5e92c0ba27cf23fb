"""Which expert of a layer has which slot: on the device, where kernels look, and here, for whoever plans.

E experts of the layer.
"""

from __future__ import annotations

import torch

from monde.core import Placement


class SlotTable:
    """slot_of_expert_E1, int32: the slot or -1; one more entry, always -1, stands for ids that name no expert.

    Every executor of the layer reads this one tensor, at one address, for captured graphs hold it. Changes are
    launched on the current stream: what was launched before sees the old table, what comes after the new one.
    """

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self.placement = placement
        entries = (*placement.slot_of_expert_E, -1)
        self.slot_of_expert_E1 = torch.tensor(entries, dtype=torch.int32, device=device)

    def vacate(self, expert_id: int) -> None:
        """The host computes this expert from now on."""
        self._set(expert_id, -1)

    def occupy(self, expert_id: int, slot: int) -> None:
        """Errors: AssertionError unless the slot is free."""
        assert slot not in self.placement.slot_of_expert_E, (expert_id, slot)
        self._set(expert_id, slot)

    def _set(self, expert_id: int, slot: int) -> None:
        self.slot_of_expert_E1[expert_id].fill_(slot)
        slots = list(self.placement.slot_of_expert_E)
        slots[expert_id] = slot
        self.placement = Placement(tuple(slots))
