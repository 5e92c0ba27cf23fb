"""`monde bench` under torchrun: one table on rank 0, tokens of all ranks; one line for what cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parents[2] / "assets" / "moe-3m"


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "monde.cli", "bench", str(MODEL), *map(str, arguments)],
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
        assert record["command"].startswith("torchrun --nproc-per-node 2 -m monde.cli bench ")
    assert prompt["samples_ts"][0] == pytest.approx(2 * 3 * 16 / (prompt["samples_ns"][0] / 1e9))


def test_a_baseline_has_no_ranks() -> None:
    done = torchrun("-p", 8, "-n", 0, "--baseline", "transformers")
    assert done.returncode != 0
    assert "error: --baseline measures one process; leave it out, or run monde bench without" in done.stderr
    assert done.stdout == ""
