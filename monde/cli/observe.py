"""What a run's routers ask for, written down for `monde plan` and for later runs: heat, and routing step by step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from monde.engine import Engine


@dataclass(frozen=True)
class Observed:
    """Files to write; None: nobody asked."""

    heat: Path | None = None
    routing: Path | None = None

    def __bool__(self) -> bool:
        return self.heat is not None or self.routing is not None

    def check(self) -> None:
        """Errors: ValueError, before anything is loaded, where a file cannot be."""
        for option, path in (("--save-heat", self.heat), ("--record-routing", self.routing)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{option} {path}: the folder {path.parent} does not exist; make it first")

    @contextmanager
    def of(self, engine: Engine, model: str) -> Iterator[None]:
        """Observe what runs inside, and write the files after it. model: the name that a record of routing keeps."""
        if self.heat is not None:
            engine.watch_heat()
        with nullcontext() if self.routing is None else engine.record_routing() as recorder:
            yield
        if self.heat is not None:
            engine.save_heat(self.heat)
        if self.routing is not None and recorder is not None:
            recorder.finish(model).save(self.routing)

    def told(self) -> list[str]:
        """Lines on what was written."""
        lines = []
        if self.heat is not None:
            lines.append(f"monde: heat saved to {self.heat}; give it to --heat of generate, bench or plan")
        if self.routing is not None:
            lines.append(f"monde: routing saved to {self.routing}; monde plan MODEL --routing {self.routing}")
        return lines
