"""Host memory that several banks share, with places for fewer experts than they have."""

from __future__ import annotations

from typing import Any

from hostcompute.layout import ExpertLayout
from hostcompute.topology import machine_memory_bytes

NOWHERE = -1  # the place of an expert that has none


class HostPlaces:
    """num_places places of layout.blob_bytes each, for banks of the native backend with experts of that size.

    Memory is reserved at once and taken when a place is first written. It stays while a bank uses it.
    Errors: ValueError for more than the machine's memory, RuntimeError where the native backend was not built.
    """

    def __init__(self, layout: ExpertLayout, num_places: int) -> None:
        num_bytes, have_bytes = num_places * layout.blob_bytes, machine_memory_bytes()
        if num_bytes > have_bytes:
            raise ValueError(
                f"HostPlaces: {num_places} places take {num_bytes / 2**30:.3g} GiB, this machine has "
                f"{have_bytes / 2**30:.3g} GiB; use fewer or smaller experts"
            )
        try:
            from hostcompute import _native
        except ImportError as error:
            raise RuntimeError(
                f"HostPlaces: needs the native backend ({error}); build it: `pip install .`"
            ) from error
        self.blob_bytes, self.num_places = layout.blob_bytes, num_places
        self.arena: Any = _native.Arena(num_bytes)

    @property
    def address(self) -> int:
        """Page aligned; place p begins p * blob_bytes later."""
        return int(self.arena.memory_range[0])

    @property
    def num_bytes(self) -> int:
        return self.num_places * self.blob_bytes
