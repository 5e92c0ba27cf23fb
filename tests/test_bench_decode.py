"""The decode benchmark end to end on a toy, and the arithmetic of its bounds and skews."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import artefact, monde_hardware
from bench.contenders.host_experts import HostExperts
from bench.contenders.lru import LruExperts
from bench.contenders.popular import Costs, PopularExperts
from bench.decode import models, skew
from bench.decode.__main__ import main
from bench.decode.bound import Ceilings, Row, Traffic, bound_s, expected_traffic, targets
from bench.decode.shapes import config_of, shape_of
from bench.decode.skew import probabilities, shares


def test_a_toy_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hostcompute._native")
    out = tmp_path / "decode.json"
    options = "--toy --device cpu --steps 2 --batches 1 --skews strong --no-generate --contenders monde,lru"
    main([*options.split(), "--out", str(out)])
    record = json.loads(out.read_text())
    rows = {(row["contender"], row["budget"]): row for row in record["results"]["rows"]}
    assert {name for name, _ in rows} == {"no experts, eager", "fetch on demand, LRU", "monde"}
    assert rows["monde", "all"]["figures"]["hit_rate"] == 1
    assert 0 < rows["monde", "100KiB"]["figures"]["hit_rate"] < 1
    assert all(len(row["samples_s"]) == 2 for key, row in rows.items() if key[0] == "monde")
    assert "monde over the LRU fetcher" in capsys.readouterr().out


def test_bound_is_the_slower_side_and_what_comes_on_top() -> None:
    top = Ceilings(100.0, 50.0, 80.0, 40.0, 1000.0, 0.5)
    assert bound_s(Traffic(12, 0, 3), 10, top, 2.0, top.cold_bytes_per_s) == pytest.approx(
        120 / 120 + 2.0 + 1.5
    )
    assert bound_s(Traffic(1, 500, 0), 10, top, 0.0, top.cold_bytes_per_s) == pytest.approx(5.0)
    # What no cold expert can hide comes on top.
    assert bound_s(Traffic(12, 50, 0, 40), 10, top, 0.0, top.cold_bytes_per_s) == pytest.approx(1.0 + 0.4)


def test_expected_traffic_counts_experts_once() -> None:
    p_LE = np.array([[1.0, 0.5, 0.5, 0.0]])
    traffic = expected_traffic(p_LE, np.array([[True, True, False, False]]), batch=2)
    assert traffic.resident_experts == pytest.approx(1.75)
    assert traffic.cold_experts == pytest.approx(0.75)
    assert traffic.layers_with_cold == pytest.approx(0.75)
    # With probability 1/4 none of both tokens is cold; then they have 4/3 and 2/3 of what residents get, 1 at most.
    assert traffic.residents_alone == pytest.approx(0.25 * (1 + 1 - (1 - 2 / 3) ** 2))


@pytest.mark.parametrize("name", ["uniform", "measured", "strong"])
def test_popularity_sums_to_the_pairs_of_a_token(name: str) -> None:
    shape = shape_of("qwen3", None, toy=False)
    share_LE = shares(name, shape)
    assert share_LE.shape == (48, 128)
    np.testing.assert_allclose(share_LE.sum(1), 1, rtol=1e-5)
    assert (np.diff(share_LE, axis=1) <= 1e-12).all()
    assert probabilities(share_LE[0], shape.num_topk).sum() == pytest.approx(shape.num_topk, rel=0.02)


def test_the_worst_case_decides_about_a_target() -> None:
    def row(contender: str, group: str, skew: str, median_s: float) -> Row:
        return Row(contender, group, "8GiB", skew, 1, 512, median_s, [], 0.9, 48, {})

    rows = [row("monde", "monde", "uniform", 1.0), row("monde", "monde", "strong", 2.0)]
    rows += [row("lru", "lru", "uniform", 4.0), row("lru", "lru", "strong", 5.0)]
    found = {target.what: target for target in targets(rows, None)}
    lru = found["monde over the LRU fetcher"]
    assert lru.got == pytest.approx(2.5)
    assert lru.met is False
    assert found["monde over accelerate's offload"].met is None


def test_the_trained_models_popularity_comes_out_of_the_router() -> None:
    """What the biases were made for, counted over the router's own choices on random tokens."""
    shape, device = shape_of("qwen3", None, toy=True), torch.device("cpu")
    config = config_of("qwen3", None, toy=True)
    dense = models.make_dense(config, device)
    model = models.build(config, dense, device, models.nothing)
    for name in ("uniform", "measured", "strong"):
        skew.apply(name, shape, dense)
        p_LE = skew.realised(model, shape, 4096)
        np.testing.assert_allclose(p_LE.sum(1), shape.num_topk)
        wanted = [probabilities(share_E, shape.num_topk) for share_E in shares(name, shape)]
        np.testing.assert_allclose(-np.sort(-p_LE, axis=1), wanted, atol=0.12)


def test_experts_of_contenders_are_those_of_transformers() -> None:
    """Slots for a quarter of the experts, so that they are fetched, evicted and fetched again; few tokens and many."""
    device = torch.device("cpu")
    config = config_of("qwen3", None, toy=True)
    model = models.build(config, models.make_dense(config, device), device, models.in_host_memory)
    model.set_experts_implementation("eager")
    theirs = models.moe_blocks(model)[1][1]
    outline = models.build(config, {}, device, lambda experts, layer_idx: experts)
    host = HostExperts(outline, 2, device)
    lru = LruExperts(host.layers[1], 4, device, None)
    always, never = (PopularExperts(host.layers[1], 4, device, None, _Costs(cpu)) for cpu in (0.0, 2.0))
    for popular in (always, never):
        popular.place(np.arange(16.0))
    torch.manual_seed(0)
    for num_tokens in (1, 3, 16, 33, 200):
        x_TD = torch.randn(num_tokens, 64).bfloat16()
        ids_TK = torch.stack([torch.randperm(16)[:4] for _ in range(num_tokens)])
        weights_TK = torch.rand(num_tokens, 4).bfloat16()
        want_TD = theirs(x_TD, ids_TK, weights_TK).float()
        for mine in (lru, always, never):
            error = (mine(x_TD, ids_TK, weights_TK).float() - want_TD).abs().max()
            # Sums of four in bf16, in another order: a few units of 2^-8 of the largest.
            assert error <= 4 * 2.0**-8 * want_TD.abs().max(), (type(mine).__name__, num_tokens)
    assert lru.num_misses > 16
    assert always.num_on_cpu > 0 == always.num_fetched
    assert never.num_fetched > 0 == never.num_on_cpu


class _Costs(Costs):
    """The same for any number of tokens; a fetch costs 1."""

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s, self.fetch_s = [cpu_s] * 6, 1.0


def test_what_ends_a_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hostcompute._native")

    def fail(*args: object) -> None:
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr("bench.decode.run.MondeModel", fail)
    out = tmp_path / "decode.json"
    options = "--toy --device cpu --steps 2 --batches 1 --skews uniform --no-generate --contenders lru,monde"
    with pytest.raises(SystemExit, match=r"ended early.*on fire"):
        main([*options.split(), "--out", str(out)])
    record = json.loads(out.read_text())
    assert {row["group"] for row in record["results"]["rows"]} == {"floor", "lru"}
    assert "on fire" in record["failure"]


def test_after_the_time_limit_nothing_starts(tmp_path: Path) -> None:
    pytest.importorskip("hostcompute._native")
    out = tmp_path / "decode.json"
    options = "--toy --device cpu --steps 2 --batches 1 --skews uniform --contenders monde --time-limit 0"
    main([*options.split(), "--out", str(out)])
    assert {row["group"] for row in json.loads(out.read_text())["results"]["rows"]} == {"floor"}


def test_the_papers_experiment_on_a_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hostcompute._native")
    out = tmp_path / "monde.json"
    monde_hardware.main(["--toy", "--device", "cpu", "--passes", "2", "--batches", "1,3", "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    rows = results["rows"]
    assert {(r["contender"], r["num_resident"]) for r in rows} == {
        ("on demand", 0), ("on demand, LRU", 4), ("monde", 0), ("monde", 4),
    }  # fmt: skip
    assert len(rows) == 4 * 2 * 2
    assert all(row["bound_s"] > row["dense_s"] > 0 for row in rows)
    assert len(results["verdicts"]) == 8
    assert "wanted" in capsys.readouterr().out


def test_a_time_limit_keeps_what_there_is(tmp_path: Path) -> None:
    rows: list[int] = []
    before, out = signal.getsignal(signal.SIGTERM), tmp_path / "rows.json"

    def run() -> None:
        with artefact.kept("rows", {"wanted": 9}, lambda: rows, out):
            for i in range(9):
                rows.append(i)
                if i == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="ended early: KeyboardInterrupt"):
        run()
    record = json.loads(out.read_text())
    assert record["results"] == [0, 1, 2, 3]
    assert "KeyboardInterrupt" in record["failure"]
    assert signal.getsignal(signal.SIGTERM) is before
