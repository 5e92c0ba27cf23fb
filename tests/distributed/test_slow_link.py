"""A link between nodes that is slow is waited for, one too slow for the time limit is an error. Needs root, iproute2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.emulated_nodes import TwoNodes, why_not

TIMEOUT_S = 4.0
TOLD = {
    "inference": "RankError: mesh: rank ",
    "training": "RuntimeError: ",
    "dispatch": "ExchangeFailed: ",
}


def over_a_link(what: str, mbit: float, folder: Path) -> list[dict[str, Any]]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    arguments = [what, "--mbit", f"{mbit:g}", "--timeout-s", f"{TIMEOUT_S:g}", "--folder", str(folder)]
    with TwoNodes() as nodes:
        nodes.run("tests.distributed.slow_link_rank", 1, arguments, deadline_s=120.0)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("what", list(TOLD))
def test_a_slow_link_only_takes_longer(what: str, tmp_path: Path) -> None:
    """A megabyte each way at 20 Mbit/s is 0.4 s, far from the limit; the rank itself compares the answers."""
    for found in over_a_link(what, 20, tmp_path):
        assert found["told"] == ""
        assert found["seconds_s"] > 0.4


@pytest.mark.slow
@pytest.mark.parametrize("what", list(TOLD))
def test_a_link_too_slow_is_an_error_on_all_ranks_in_time(what: str, tmp_path: Path) -> None:
    """At 0.2 Mbit/s it would be 40 s: both ranks hear of it within the limit of the one that waits longest, twice."""
    for found in over_a_link(what, 0.2, tmp_path):
        assert found["told"].startswith(TOLD[what]), found["told"]
        assert found["seconds_s"] < 2 * TIMEOUT_S + 3
