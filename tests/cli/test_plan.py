"""`monde plan`: the arithmetic, the forecast, and one line for what cannot be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np

from monde.planning.machines import DESCRIBED
from monde.routing.heat import Heat
from tests.cli.conftest import MODEL, Monde


def test_a_plan_needs_no_weights(monde: Monde, tmp_path: Path) -> None:
    shutil.copy(MODEL / "config.json", tmp_path)
    outcome = monde("plan", tmp_path, "--machine", "laptop-4060")
    assert outcome.exit_code == 0, outcome.stderr
    assert "64 of 64 experts" in outcome.stdout
    assert re.search(r"decode: +[\d.e+]+ tokens/s at best, limited by the launches", outcome.stdout)
    assert DESCRIBED["laptop-4060"].source in outcome.stdout


def smallest_budget(monde: Monde) -> int:
    """The bytes that the error of an impossible budget names."""
    outcome = monde("plan", MODEL, "-m", "h200", "--gpu-memory", "1MiB")
    assert outcome.exit_code == 2
    assert outcome.stderr.count("\n") == 1
    found = re.search(r"gpu_memory=(\d+)", outcome.stderr)
    assert found is not None
    return int(found.group(1))


def test_json_says_what_fits_and_what_more_would_buy(monde: Monde) -> None:
    smallest, speeds = smallest_budget(monde), []
    for more_mib in (0, 1, 2):
        budget = smallest + more_mib * 2**20
        outcome = monde("plan", MODEL, "-m", "h200", "--gpu-memory", budget, "--json")
        answer = json.loads(outcome.stdout)
        assert answer["gpu_used_bytes"] <= answer["gpu_bytes"] == budget
        assert answer["host_used_bytes"] <= answer["host_bytes"]
        assert answer["decode"]["gain_of_one_more_gib_of_gpu_memory"] >= 1
        assert set(answer["prefill"]["gain_of_10_percent_more"]) == {"host", "bus", "GPU", "launches"}
        assert answer["num_experts"] == 64
        speeds.append((answer["num_resident"], answer["decode"]["tokens_per_s"]))
    assert speeds == sorted(speeds)
    assert speeds[0][0] < speeds[-1][0]


def test_the_smallest_budget_that_an_error_names_works(monde: Monde) -> None:
    smallest = smallest_budget(monde)
    assert monde("plan", MODEL, "-m", "h200", "--gpu-memory", smallest).exit_code == 0
    assert monde("plan", MODEL, "-m", "h200", "--gpu-memory", smallest - 1).exit_code == 2


def test_a_measured_profile_is_a_file(monde: Monde, tmp_path: Path) -> None:
    DESCRIBED["epyc-4090"].save(tmp_path / "mine.json")
    from_file = monde("plan", MODEL, "-m", tmp_path / "mine.json", "--json")
    assert json.loads(from_file.stdout) == json.loads(
        monde("plan", MODEL, "-m", "epyc-4090", "--json").stdout
    )


def test_known_heat_makes_slots_worth_more(monde: Monde, tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    budget = ("-m", "h200", "--gpu-memory", smallest_budget(monde) + 2**20, "--json")
    counts = [np.array([90, 90, 90, 90] + [1] * 12, np.float32) for _ in range(4)]
    Heat("moe-3m", tuple(counts), 100.0).save(path)
    equal, hot = monde("plan", MODEL, *budget), monde("plan", MODEL, *budget, "--heat", path)
    assert json.loads(hot.stdout)["decode"]["step_s"] < json.loads(equal.stdout)["decode"]["step_s"]
    Heat("another", (counts[0],), 100.0).save(path)
    refused = monde("plan", MODEL, *budget, "--heat", path)
    assert refused.exit_code == 2
    assert "record the heat of this model" in refused.stderr


def test_what_the_machine_lacks_is_refused(monde: Monde) -> None:
    outcome = monde("plan", MODEL, "-m", "laptop-4060", "--gpu-memory", "24GiB")
    assert outcome.exit_code == 2
    assert "more than the 8 GiB of laptop-4060" in outcome.stderr
    outcome = monde("plan", MODEL, "-m", "abacus")
    assert outcome.exit_code == 2
    assert "described machines h200, laptop-4060" in outcome.stderr
