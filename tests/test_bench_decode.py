"""The decode benchmark end to end on a toy, and the arithmetic of its bounds and skews."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.decode.__main__ import main
from bench.decode.bound import Ceilings, Row, Traffic, bound_s, expected_traffic, targets
from bench.decode.shapes import shape_of
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
    assert bound_s(Traffic(12, 0, 3), 10, top, 2.0) == pytest.approx(120 / 120 + 2.0 + 1.5)
    assert bound_s(Traffic(1, 500, 0), 10, top, 0.0) == pytest.approx(5.0)


def test_expected_traffic_counts_experts_once() -> None:
    p_LE = np.array([[1.0, 0.5, 0.5, 0.0]])
    traffic = expected_traffic(p_LE, np.array([[True, True, False, False]]), batch=2)
    assert traffic.resident_experts == pytest.approx(1.75)
    assert traffic.cold_experts == pytest.approx(0.75)
    assert traffic.layers_with_cold == pytest.approx(0.75)


@pytest.mark.parametrize("skew", ["uniform", "measured", "strong"])
def test_popularity_sums_to_the_pairs_of_a_token(skew: str) -> None:
    shape = shape_of("qwen3", None, toy=False)
    share_LE = shares(skew, shape)
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
