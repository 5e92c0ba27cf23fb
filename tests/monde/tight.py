"""Models whose residents have no copy on the host, and what watches their exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from monde.device.copies import Arrival, InOrderCopies
from monde.executors.exchange import ExchangeMover
from monde.executors.mover import SlotMover
from monde.weights.places import PlacePool
from tests.monde.test_residency import (
    RESTLESS,
    dynamic,
)

pytest.importorskip("hostcompute._native")
CPU = torch.device("cpu")


def host_memory(original: Any, num_spares: int, share: float = 0.5) -> int:
    """What the experts without a slot take, with so many spare places."""
    plan = dynamic(original, share, residency="static").monde.plan
    layer = plan.size.layers[0]
    return int(
        plan.host_used_bytes + sum(plan.num_resident_L) * layer.kept_bytes + num_spares * layer.expert_bytes
    )


def tight(original: Any, num_spares: int = 2, share: float = 0.5, **wanted: Any) -> Any:
    """Every step may exchange as many residents as there are spare places."""
    model = dynamic(original, share, host_memory=host_memory(original, num_spares, share), **wanted)
    assert model.monde.plan.num_spare_places == num_spares
    residency = model.monde.residency
    residency.settings, residency.swap_share, residency.tracker.keep_per_step = RESTLESS, 1e9, 0.01
    return model


def use(engine: Any, copies: InOrderCopies) -> None:
    """These copies instead of the engine's."""
    r = engine.residency
    mover = SlotMover(r.tables, r._movable, r._blobs, copies)
    r._mover = ExchangeMover(mover, r._movable, r._places, r._blobs, copies)


def assert_whole(engine: Any, original: Any) -> None:
    """At any time every expert can be exported from where its tables say that it is, each is in one place, and the
    places are as many as ever."""
    for pool in {id(table.pool): table.pool for table in engine.residency._places.values()}.values():
        held = [
            place
            for table in engine.residency._places.values()
            if table.pool is pool
            for place in table.bank.place_of_expert_E
            if place >= 0
        ]
        under_way = engine.residency._mover._taken
        assert sorted([*held, *pool.free, *under_way]) == list(range(pool.memory.num_places))
    model = engine_state(engine)
    for key, tensor in original.items():
        assert torch.equal(model[key], tensor), key


def engine_state(engine: Any) -> dict[str, Tensor]:
    return {
        f"{l}.{e}.{role}": tensor
        for l, layer in enumerate(engine.layers)
        for e in range(layer.spec.num_experts)
        for role, tensor in engine.export_expert(l, e).items()
    }


class NoCopy(RuntimeError):
    """A copy that the device refuses."""


class LateCopies(InOrderCopies):
    """What is copied to holds NaN from the start until it was asked for `patience` times; so do places left free."""

    def __init__(self, patience: int) -> None:
        self.patience, self.num_late, self.fails = patience, 0, 0

    def to_device(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        if self.fails:
            self.fails -= 1
            raise NoCopy
        for target, _ in pairs:
            target.view(torch.uint8).fill_(0xFF)
        return self._late(list(pairs))

    def launched(self) -> Arrival:
        return self._late([])

    def _late(self, pairs: list[tuple[Tensor, Tensor]]) -> Arrival:
        late, patience = self, self.patience

        class Late:
            asked = 0

            def done(self) -> bool:
                self.asked += 1
                late.num_late += 1
                if self.asked == patience + 1:
                    for target, source in pairs:
                        target.copy_(source)
                return self.asked > patience

            def order(self) -> None: ...

        return Late()


def poison_free_places(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a place that was given back computes NaN."""
    blobs = next(iter(engine.residency._blobs.values()))
    give_back = PlacePool.give_back

    def poisoned(pool: PlacePool, place: int) -> None:
        blobs.run_B(place, 1).fill_(0xFF)
        give_back(pool, place)

    monkeypatch.setattr(PlacePool, "give_back", poisoned)
