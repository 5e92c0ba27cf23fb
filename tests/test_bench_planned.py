"""Plans next to measurements: a budget that fails leaves the others standing."""

from __future__ import annotations

import argparse
import time
from typing import Any

import pytest

from bench import planned
from bench.planned import Row, compare_all, worst_of
from monde.cli.plan_forecast import Question
from monde.planning.machines import DESCRIBED
from tests.cli.conftest import MODEL

QUESTION = Question(str(MODEL), DESCRIBED["h200"], 1 << 34, context=64, batch=1, prompt=64)


def row(phase: str, planned_tokens_per_s: float) -> Row:
    return Row(1, phase, 0, 64, 0.0, planned_tokens_per_s, 100.0, [100.0], "host")


def test_budgets_rise_to_everything_resident() -> None:
    found = planned.budgets(QUESTION)
    size = QUESTION.outlined(None).size
    assert len(found) == 5
    assert found == sorted(found)
    assert QUESTION.forecast(QUESTION.outlined(None), found[0]).plan.gpu_used_bytes <= found[0]
    assert sum(QUESTION.forecast(QUESTION.outlined(None), found[-1]).plan.num_resident_L) == sum(
        layer.num_experts for layer in size.layers
    )


def test_what_fails_is_kept_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = planned.budgets(QUESTION)

    def measured(model: str, gpu_bytes: int, options: Any) -> list[dict[str, Any]]:
        if gpu_bytes == budgets[2]:
            raise RuntimeError("monde bench failed: out of memory")
        return [{"n_prompt": n, "resident_share": 0.5, "samples_ts": [10.0, 30.0, 20.0]} for n in (64, 0)]

    monkeypatch.setattr(planned, "measured", measured)
    options = argparse.Namespace(seconds=1000.0)
    rows, failures = compare_all(QUESTION, options, time.perf_counter())
    assert [r.phase for r in rows] == ["prefill", "decode"] * 4
    assert all(r.measured_tokens_per_s == 20 for r in rows)
    assert len(failures) == 1
    assert "out of memory" in failures[0]
    late, failures = compare_all(QUESTION, options, time.perf_counter() - 2000)
    assert late == []
    assert len(failures) == 5
    assert "raise --seconds" in failures[0]


def test_the_worst_is_by_phase_and_in_either_direction() -> None:
    rows = [row("decode", 90.0), row("decode", 70.0), row("prefill", 120.0)]
    assert worst_of(rows) == pytest.approx({"decode": 0.3, "prefill": 0.2})
    assert worst_of([]) == {}
