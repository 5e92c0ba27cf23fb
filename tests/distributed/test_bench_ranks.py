"""`monde bench` and `generate` under torchrun: one table or text on rank 0, tokens of all ranks; one line for what cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parents[2] / "assets" / "moe-3m"


def torchrun(*arguments: object, command: str = "bench") -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launch, "-m", "monde", command, str(MODEL), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_one_table_of_all_ranks() -> None:
    done = torchrun("-p", 16, "-n", 4, "-r", 2, "-b", 3, "--parallel", "auto", "-o", "json")
    assert done.returncode == 0, done.stderr
    prompt, generated = json.loads(done.stdout)
    assert (prompt["test"], generated["test"]) == ("pp16", "tg4")
    for record in (prompt, generated):
        assert (record["n_ranks"], record["n_seqs"]) == (2, 3)
        assert record["backends"].endswith(", auto")
        assert record["command"].startswith("torchrun --nproc-per-node 2 -m monde bench ")
    assert prompt["samples_ts"][0] == pytest.approx(2 * 3 * 16 / (prompt["samples_ns"][0] / 1e9))


def test_a_baseline_has_no_ranks() -> None:
    done = torchrun("-p", 8, "-n", 0, "--baseline", "transformers")
    assert done.returncode != 0
    assert "error: --baseline measures one process; leave it out, or run monde bench without" in done.stderr
    assert done.stdout == ""


def test_one_text_the_same_as_of_one_process() -> None:
    arguments = ("It is a truth", "-n", 12, "--temperature", 0.8, "--seed", 5)
    over_ranks = torchrun(*arguments, command="generate")
    assert over_ranks.returncode == 0, over_ranks.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "monde", "generate", str(MODEL), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert over_ranks.stdout == alone.stdout != ""
    assert over_ranks.stderr.count("monde: first token after") == 1
