"""The forecast is held to what GPU machines measured, through profiles described from the same runs' ceilings."""

from __future__ import annotations

import numpy as np
import pytest

from bench.forecast import Case, all_cases

CASES = all_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.artefact}: {case.what}")
def test_every_case_is_forecast_within_a_fifth(case: Case) -> None:
    assert abs(case.error) < 0.2, case


def test_most_are_forecast_well() -> None:
    errors = np.abs([case.error for case in CASES])
    assert len(CASES) == 42
    assert np.median(errors) < 0.1
