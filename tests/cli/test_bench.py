"""`monde bench`: what is measured, the formats, baselines, the picture."""

from __future__ import annotations

import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from monde.cli.bench import parse_tests
from tests.cli.conftest import MODEL, Monde, Outcome

SHORT = ("-p", 16, "-n", 4, "-r", 2, "-t", 1)


def records(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.exit_code == 0, outcome.stderr
    return json.loads(outcome.stdout)


def test_every_combination_is_a_test() -> None:
    tests = parse_tests("8,16", "4", "0,32", "1,2")
    assert len(tests) == 3 * 2 * 2
    assert {t.name for t in tests} == {"pp8", "pp16", "tg4", "pp8 @ d32", "pp16 @ d32", "tg4 @ d32"}
    assert [t.name for t in parse_tests("0", "4", "0", "1")] == ["tg4"]


def test_json_has_figures_and_all_it_takes_to_repeat_them(monde: Monde) -> None:
    prompt, generated = records(monde("bench", MODEL, *SHORT, "-o", "json"))
    assert (prompt["test"], generated["test"]) == ("pp16", "tg4")
    for record in (prompt, generated):
        assert len(record["samples_ns"]) == 2
        assert record["avg_ts"] > 0
        assert record["model_n_params"] == 2_893_952
        assert record["text"] == "literature (shipped)"
        assert record["cpu_info"]
        assert set(record["versions"]) >= {"torch", "transformers", "monde"}
        typed = ["monde", "bench", *map(str, (MODEL, *SHORT)), "-o", "json"]
        assert shlex.split(record["command"]) == typed
        assert record["resident_share"] == 0
        assert record["peak_host_bytes"] > 0
    assert prompt["ttft_s"] == pytest.approx(prompt["avg_ns"] / 1e9)
    assert generated["tpot_s"] == pytest.approx(generated["avg_ns"] / 1e9 / 4)


def test_generation_reads_top_k_experts_of_every_layer(monde: Monde) -> None:
    """moe-3m: 4 layers, top-2, D=128, F=64, three bf16 matrices an expert."""
    record = records(monde("bench", MODEL, "-p", 0, "-n", 4, "-r", 1, "-t", 1, "-o", "json"))[0]
    assert record["host_weight_bytes_per_token"] == 4 * 2 * 3 * 128 * 64 * 2
    assert record["h2d_bytes_per_token"] == record["d2h_bytes_per_token"] == 0


def test_deferral_is_named_and_no_bug_next_to_a_baseline(monde: Monde) -> None:
    """In fp32 any other difference from the baseline's tokens would be an error; the same experts are read."""
    what = ("-p", 0, "-n", 4, "-r", 1, "-t", 1, "-o", "json", "--dtype", "fp32", "--baseline", "transformers")
    record = records(monde("bench", MODEL, *what, "--deferred-experts", 1))[0]
    assert record["backends"].endswith("1 experts a token deferred")
    assert record["agreement"] < 1
    assert record["host_weight_bytes_per_token"] == 4 * 2 * 3 * 128 * 64 * 4


def test_residents_that_follow_the_routing_are_met_more_often(monde: Monde) -> None:
    """Half of moe-3m's experts have slots, and the CPU stands in for the GPU."""
    shape = ("-p", 0, "-n", 200, "-r", 1, "-t", 1, "-o", "json", "--device", "cpu", "--gpu-memory", "768KiB")
    found = {
        residency: records(monde("bench", MODEL, *shape, "--residency", residency))[0]
        for residency in ("static", "dynamic")
    }
    assert found["static"]["swaps_per_token"] == 0
    assert found["dynamic"]["resident_share"] > 1.2 * found["static"]["resident_share"] > 0
    swapped_bytes = found["dynamic"]["swaps_per_token"] * 3 * 128 * 64 * 2
    assert found["dynamic"]["swap_bytes_per_token"] == pytest.approx(swapped_bytes)


def test_prompts_can_be_split_by_anothers_rule(monde: Monde) -> None:
    shape = ("-p", 80, "-n", 0, "-r", 1, "-t", 1, "-o", "json", "--device", "cpu", "--gpu-memory", "768KiB")
    moved = {
        rule: records(monde("bench", MODEL, *shape, "--split-policy", rule))[0]["h2d_bytes_per_token"]
        for rule in ("all-host", "all-fetch")
    }
    assert moved["all-fetch"] > 2 * moved["all-host"] > 0
    refused = monde("bench", MODEL, *shape, "--split-policy", "greedy")
    assert refused.exit_code == 2
    assert "'greedy' is not one of 'best', 'monde-rule'" in " ".join(refused.stderr.split())


def test_csv_and_jsonl_hold_the_same_records(monde: Monde) -> None:
    lines = monde("bench", MODEL, *SHORT, "-o", "jsonl").stdout.splitlines()
    rows = list(csv.DictReader(io.StringIO(monde("bench", MODEL, *SHORT, "-o", "csv").stdout)))
    assert [json.loads(line)["test"] for line in lines] == [row["test"] for row in rows] == ["pp16", "tg4"]
    assert set(rows[0]) == set(json.loads(lines[0]))
    assert len(json.loads(rows[0]["samples_ns"])) == 2


def test_markdown_is_a_table(monde: Monde) -> None:
    outcome = monde("bench", MODEL, *SHORT, "-d", "0,8", "-b", 2)
    table = [line for line in outcome.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({line.count("|") for line in table}) == 1
    assert len({len(line) for line in table}) == 1
    for name in ("pp16 ", "pp16 @ d8", "tg4 ", "tg4 @ d8", "native", " ± "):
        assert any(name in line for line in table)
    assert "vs best baseline" not in table[0]  # no baseline, no column


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_baselines_run_side_by_side_and_agree(monde: Monde, dtype: str) -> None:
    found = records(
        monde("bench", MODEL, *SHORT, "--dtype", dtype, "--baseline", "transformers:best", "-o", "json")
    )
    runners = ["monde", "transformers:eager", "transformers:grouped_mm", "transformers:batched_mm"]
    assert [record["runner"] for record in found] == 2 * runners
    prompts = found[:4]
    best = max(record["avg_ts"] for record in prompts[1:])
    assert prompts[0]["speedup_over_best_baseline"] == pytest.approx(prompts[0]["avg_ts"] / best)
    assert max(record["speedup_over_best_baseline"] for record in prompts[1:]) == pytest.approx(1)
    assert all(record["agreement"] >= (1 if dtype == "fp32" else 0.9) for record in found)
    assert all(record["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype] for record in found)


def test_a_prompt_that_batched_mm_has_no_memory_for_is_skipped(
    monde: Monde, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monde.cli.baselines._free_bytes", lambda device: 100 << 20)
    arguments = ("-p", 1000, "-n", 2, "-r", 1, "-t", 1, "--baseline", "transformers:batched_mm")
    found = records(monde("bench", MODEL, *arguments, "-o", "json"))
    assert [bool(record["skipped"]) for record in found] == [False, True, False, False]
    markdown = monde("bench", MODEL, *arguments).stdout
    assert "skipped: pp1000 by transformers:batched_mm would copy" in markdown


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_a_picture(monde: Monde, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"speed.{suffix}"
    outcome = monde("bench", MODEL, *SHORT, "--baseline", "transformers", "--plot", path)
    assert outcome.exit_code == 0, outcome.stderr
    content = path.read_bytes()
    assert len(content) > 10_000
    assert content.startswith(b"\x89PNG") or b"<svg" in content[:500]


def test_own_text_and_random_tokens(monde: Monde, tmp_path: Path, bare_model: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("Call me Ishmael. " * 20)
    assert records(monde("bench", MODEL, *SHORT, "--text", text, "-o", "json"))[0]["text"] == "mine.txt"
    asked = records(monde("bench", MODEL, *SHORT, "--random-tokens", "-o", "json"))[0]
    assert asked["text"] == "random tokens (asked for)"
    bare = records(monde("bench", bare_model, *SHORT, "-o", "json"))[0]
    assert bare["text"] == "random tokens (the model has no tokenizer)"


def test_standard_output_holds_nothing_but_the_result(monde: Monde) -> None:
    outcome = monde("bench", MODEL, *SHORT, "-o", "json")
    assert outcome.stdout.startswith("[")
    json.loads(outcome.stdout)
