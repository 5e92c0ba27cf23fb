"""The table in which owners of machines look themselves up: what the planner says now, and a row of speeds for everybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.machines import MACHINES, all_rows, tables

ROOT = Path(__file__).parents[1]
ROWS: list[dict[str, Any]] = json.loads((ROOT / "bench" / "results" / "machines.json").read_text())["results"]


def test_the_artefact_is_what_the_planner_says() -> None:
    """If this fails, run `python -m bench.machines --out bench/results/machines.json` and mend docs/planning.md."""
    now = all_rows()
    assert len(now) == len(ROWS)
    for row, kept in zip(now, ROWS, strict=True):
        assert row == {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in kept.items()}


def test_the_page_has_the_tables_of_the_artefact() -> None:
    page = (ROOT / "docs" / "planning.md").read_text()
    for title, table in tables(ROWS).items():
        assert f"\n\n**{title}**\n\n{table}\n\n" in page


@pytest.mark.parametrize("machine", MACHINES)
def test_the_owner_of_every_machine_finds_speeds(machine: str) -> None:
    assert any(
        row["machine"] == machine
        and row.get("decode_tokens_per_s", 0) > 0
        and row["prefill_tokens_per_s"] > 0
        for row in ROWS
    )
