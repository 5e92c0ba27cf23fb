"""The benchmark machinery: turns, pairing by round, artefacts. The figures themselves are nobody's test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import artefact, peers
from bench.cost_model import Call, Mix
from bench.rounds import Summary, interleave, ratio, repeated
from hostcompute import ExpertBank, ExpertSpec, make_pool
from monde.calibration.host import fill


def test_contenders_take_turns_and_the_first_one_rotates() -> None:
    order: list[str] = []

    def contender(name: str, step_s: float):  # type: ignore[no-untyped-def]
        return lambda round_s: order.append(name) or [step_s]  # type: ignore[func-returns-value]

    summaries = interleave({"a": contender("a", 1.0), "b": contender("b", 3.0)}, num_rounds=3, round_s=0)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert ratio(summaries["b"], summaries["a"]) == 3


def test_ratio_pairs_rounds() -> None:
    """A machine that slows down for a while slows both."""
    fast, slow = Summary.of([[1.0], [9.0], [1.0]]), Summary.of([[2.0], [18.0], [2.0]])
    assert ratio(slow, fast) == 2


def test_summary_keeps_every_sample() -> None:
    summary = Summary.of([[float(i) for i in range(10)], [float(i) for i in range(10, 21)]])
    assert (summary.p10_s, summary.median_s, summary.p90_s) == (2, 10, 18)
    assert len(summary.samples_s) == 21


def test_repeated_goes_on_counting() -> None:
    steps: list[int] = []
    measure = repeated(steps.append)
    assert len(measure(0)) == 3
    measure(0)
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6]


def test_artefact_states_where_it_was_measured(tmp_path: Path) -> None:
    where = artefact.write("demo", {"threads": 2}, [1.5], tmp_path / "results" / "demo.json")
    record = json.loads(where.read_text())
    assert record["results"] == [1.5]
    assert record["configuration"] == {"threads": 2}
    assert record["commit"]
    assert record["machine"]["num_cpus"] >= 1
    assert record["versions"]["numpy"] != "not installed"


def test_a_ggml_harness_is_run_and_read(tmp_path: Path) -> None:
    program = tmp_path / "harness"
    program.write_text('#!/bin/sh\necho noise\necho "{\\"us_med\\": $2$3, \\"fmt\\": \\"$1\\"}"\n')
    program.chmod(0o755)
    assert peers.ggml(f"ik:bf16_r16={program}").measure(batch=4, num_threads=2)(0.1) == [42e-6]


def test_a_peer_that_fails_is_an_error(tmp_path: Path) -> None:
    program = tmp_path / "harness"
    program.write_text("#!/bin/sh\necho 'no such type' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"peer ik failed.*no such type"):
        peers.ggml(f"ik={program}").measure(1, 1)(0.1)
    with pytest.raises(ValueError, match="NAME=PATH"):
        peers.ggml(str(program))


def test_a_call_of_a_mix_gives_every_expert_its_tokens() -> None:
    pytest.importorskip("hostcompute._native")
    spec = ExpertSpec(num_experts=6, d_model=16, d_ffn=16)
    with fill(ExpertBank(spec, "native", make_pool(1))) as bank:
        call = Call(bank, np.array([3, 1, 5, 2]))
        for first in (0, 4, 8):  # the next experts in every call
            assert call.first == first
            assert call.seconds() > 0
            assert bank.last_counts is not None
            assert bank.last_counts.num_pairs == 11
            assert bank.last_counts.num_experts == 4


def test_a_mix_is_as_wrong_as_its_median() -> None:
    assert Mix("host", 1, 1, [1], 0.5, [1.0, 9.0, 1.0]).relative_error == 0.5


def test_artefacts_do_not_say_where_files_lay() -> None:
    given = {
        "command": ["bench/x.py", "--peer=/home/me/bin/peer", "/opt/a b/model"],
        "n": 3,
        "at": ("1/2", None),
    }
    assert artefact.without_folders(given) == {
        "command": ["bench/x.py", "--peer=peer", "model"],
        "n": 3,
        "at": ["1/2", None],
    }
