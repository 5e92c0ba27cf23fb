"""`monde bench --trace`: what the host's threads did, by layer, on the clock of torch's profiler."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hostcompute.timeline import HostSpan
from monde.cli.timeline import Recording, device_events, host_events, without_probe_lines
from tests.cli.conftest import MODEL, Monde

NUM_LAYERS = 4  # of the shipped model, top-2


@pytest.fixture
def events(monde: Monde, tmp_path: Path) -> list[dict[str, Any]]:
    pytest.importorskip("hostcompute._native")
    path = tmp_path / "out.json"
    outcome = monde(
        "bench", MODEL, "-p", 16, "-n", 12, "-r", 1, "-t", 2, "--backend", "native", "--trace", path
    )
    assert outcome.exit_code == 0, outcome.stderr
    assert "timeline saved to" in outcome.stderr
    found: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return found


def spans_of(events: list[dict[str, Any]], cat: str) -> list[dict[str, Any]]:
    return sorted((e for e in events if e.get("cat") == cat and e["ph"] == "X"), key=lambda e: e["ts"])


def test_every_layer_of_every_step_is_there(events: list[dict[str, Any]]) -> None:
    forwards = [e for e in spans_of(events, "host") if e["tid"] == 0]
    assert [e["name"] for e in forwards] == [f"layer {l}" for l in range(NUM_LAYERS)] * (1 + 8)
    assert [e["args"]["tokens"] for e in forwards] == [16] * NUM_LAYERS + [1] * 8 * NUM_LAYERS
    assert forwards[-1]["args"]["pairs"] == 2
    assert forwards[-1]["args"]["weight_bytes"] == 2 * 3 * 128 * 64 * 2
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert "host experts" in names


def test_threads_work_within_the_layer_that_they_name(events: list[dict[str, Any]]) -> None:
    host = spans_of(events, "host")
    forwards = [e for e in host if e["tid"] == 0]
    phases = [e for e in host if e["tid"] > 0 and e["args"]["layer"] is not None]
    assert {e["name"].split()[-1] for e in phases} >= {"gate_up", "down"}
    for phase in phases:
        (around,) = (f for f in forwards if f["ts"] <= phase["ts"] <= f["ts"] + f["dur"])
        assert phase["name"].startswith(around["name"] + " ")
        assert phase["ts"] + phase["dur"] <= around["ts"] + around["dur"] + 1e-3


def test_both_clocks_are_one(events: list[dict[str, Any]]) -> None:
    """The host's forward lies within the span of the layer that Python called, give or take a reading of clocks."""
    called = [e for e in spans_of(events, "user_annotation") if e["name"].startswith("layer")]
    forwards = [e for e in spans_of(events, "host") if e["tid"] == 0]
    assert len(called) == len(forwards)
    for outer, inner in zip(called, forwards, strict=True):
        assert outer["name"] == inner["name"]
        assert outer["ts"] - 100 < inner["ts"]
        assert inner["ts"] + inner["dur"] < outer["ts"] + outer["dur"] + 100


def test_the_profiler_prints_its_errors_alone(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hostcompute._native")
    with Recording([], "cpu").on():
        os.write(2, b"USDT: of others\n")
    with without_probe_lines():
        os.write(2, b"USDT:12 Profiler.cpp] start\nERROR:12 Profiler.cpp] no counters\n")
    assert capfd.readouterr().err == "USDT: of others\nERROR:12 Profiler.cpp] no counters\n"


def test_decode_kernels_get_their_layer() -> None:
    names = ["route", "gate_up", "down", "combine", "route", "combine"] * 2
    kernels = [
        {"ph": "X", "cat": "kernel", "name": n, "ts": 10.0 * i, "dur": 5.0, "tid": 7}
        for i, n in enumerate(names)
    ]
    other = {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 1.0, "dur": 1.0, "tid": 7}
    found = device_events([other, *kernels], num_layers=2)
    assert [k["args"]["layer"] for k in kernels] == [0, 0, 0, 0, 1, 1] * 2
    layers = [e for e in found if e.get("cat") == "layer"]
    assert [(e["name"], e["ts"], e["dur"]) for e in layers] == [
        ("layer 0", 0.0, 35.0), ("layer 1", 40.0, 15.0), ("layer 0", 60.0, 35.0), ("layer 1", 100.0, 15.0),
    ]  # fmt: skip
    assert "args" not in other


def test_a_phase_outside_of_forwards_has_no_layer() -> None:
    spans = [HostSpan("dense", 0, 5, 0, 0, 0, 0, 0, 3), HostSpan("forward", 10, 20, 99, -1, 1, 2, 400, 0)]
    dense, forward = (e for e in host_events(spans, {99: 7}, shift_ns=1_000_000) if e["ph"] == "X")
    assert (dense["name"], dense["tid"], dense["ts"], dense["args"]["layer"]) == ("dense", 1, 1000.0, None)
    assert (forward["name"], forward["ts"], forward["dur"]) == ("layer 7", pytest.approx(1000.01), 0.01)
    assert forward["args"]["GB_per_s"] == 40


def test_bad_paths_are_refused_before_loading(monde: Monde, tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "out.txt", "ends in .json"),
        (tmp_path / "no" / "out.json", "does not exist"),
    ):
        outcome = monde("bench", "no-such-model", "--trace", path)
        assert outcome.exit_code != 0
        assert why in outcome.stderr


def test_other_backends_record_nothing(monde: Monde, tmp_path: Path) -> None:
    outcome = monde(
        "bench", MODEL, "-p", 4, "-n", 0, "-r", 1, "--backend", "numba", "--trace", tmp_path / "o.json"
    )
    assert outcome.exit_code != 0
    assert "only the native backend records what it does" in outcome.stderr
