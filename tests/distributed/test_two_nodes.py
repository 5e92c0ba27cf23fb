"""Two emulated nodes with a slow link between them: what a link's bytes decide, measured. Needs root and iproute2."""

from __future__ import annotations

from statistics import median

import pytest

from bench.emulated_nodes import why_not
from bench.network import link_s, measure, summary


@pytest.mark.slow
def test_rows_that_leave_once_take_half_as_long() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    cases = measure(ranks_per_node=2, mbit=100, kib=[1024], rounds=3, more_s=1.0, deadline_s=200.0)
    dispatch = next(case for case in cases if case["exchange"] == "dispatch")
    seconds = {way: median(samples) for way, samples in dispatch["samples_s"].items()}
    # Shaped to 100 Mbit/s, two ranks cannot send 1 MiB each in less than the link takes; one MiB takes half of that.
    assert seconds["redundant"] > 1.8 * link_s(dispatch)
    assert min(seconds["drop + gather"], seconds["pipelined 4"]) > 0.9 * link_s(dispatch)
    assert seconds["redundant"] / seconds[dispatch["chosen"]] > 1.5
    assert summary(cases)["num_cases"] == 2
