"""`--save-heat` and `--record-routing`: what a run asked for, for `monde plan` and later runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from monde.routing.heat import Heat
from monde.routing.trace import Trace
from tests.cli.conftest import MODEL, Monde

NUM_LAYERS, NUM_TOPK, NUM_NEW = 4, 2, 9
PROMPT = "It is a truth universally acknowledged, that"


def test_generate_writes_what_plan_reads(monde: Monde, tmp_path: Path) -> None:
    heat, routing = tmp_path / "heat", tmp_path / "routing.npz"
    files = ("--save-heat", heat, "--record-routing", routing)
    plain = monde("generate", MODEL, PROMPT, "-n", NUM_NEW, "--dtype", "fp32")
    told = monde("generate", MODEL, PROMPT, "-n", NUM_NEW, "--dtype", "fp32", *files)
    assert told.exit_code == 0, told.stderr
    assert told.stdout == plain.stdout
    assert "heat saved" in told.stderr
    assert "monde plan MODEL --routing" in told.stderr
    trace, counted = Trace.load(routing), Heat.load(heat)
    num_tokens = [len(step[0]) for step in trace.steps]
    assert num_tokens[0] > 1
    assert num_tokens[1:] == [1] * (NUM_NEW - 1)  # the last token is not read
    assert [len(layer) for layer in counted.count_L] == [16] * NUM_LAYERS
    for count_E in counted.count_L:
        assert 0.7 <= count_E.sum() / (sum(num_tokens) * NUM_TOPK) <= 1.001  # older ones weigh less
    budget = ("-m", "h200", "--heat", heat, "--routing", routing, "--json")
    answer = json.loads(monde("plan", MODEL, *budget).stdout)
    assert answer["routing"]["num_steps"] == NUM_NEW
    again = monde(
        "generate", MODEL, PROMPT, "-n", NUM_NEW, "--device", "cpu", "--gpu-memory", "64MiB", "--heat", heat
    )
    assert again.exit_code == 0, again.stderr


def test_bench_observes_a_round_of_its_own(monde: Monde, tmp_path: Path) -> None:
    routing = tmp_path / "routing.npz"
    told = monde(
        "bench", MODEL, "-p", 16, "-n", 3, "-d", 2, "-r", 1, "-o", "json", "--record-routing", routing
    )
    assert told.exit_code == 0, told.stderr
    shapes = [step[0].shape for step in Trace.load(routing).steps]
    assert shapes == [(2, NUM_TOPK), (16, NUM_TOPK), (2, NUM_TOPK), *[(1, NUM_TOPK)] * 3]


@pytest.mark.parametrize("option", ["--save-heat", "--record-routing"])
def test_a_folder_that_is_not_there(monde: Monde, tmp_path: Path, option: str) -> None:
    told = monde("generate", MODEL, PROMPT, option, tmp_path / "no" / "file")
    assert told.exit_code == 2
    assert told.stderr.startswith(f"monde: error: {option}")
    assert told.stderr.count("\n") == 1
