"""The heat record against counting by hand; files against what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from monde.routing.heat import Heat, HeatTracker

Steps = list[list[list[tuple[int, float]]]]  # [step][layer][pair] -> (id, weight)
pairs = st.lists(st.tuples(st.integers(-3, 9), st.sampled_from([0.0, 0.5, -1.0])), max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(pairs, pairs), max_size=6), st.floats(0.5, 20), st.booleans())
def test_counts_are_those_of_a_loop(
    steps: list[tuple[list[tuple[int, float]], ...]], half_life: float, as_torch: bool
) -> None:
    num_experts_L = (4, 7)
    tracker = HeatTracker(num_experts_L, half_life)
    expected = [np.zeros(n) for n in num_experts_L]
    for step in steps:
        tracker.step()
        expected = [e * 0.5 ** (1 / half_life) for e in expected]
        for l, routed in enumerate(step):
            ids, weights = np.array([i for i, _ in routed], int), np.array([w for _, w in routed])
            if as_torch:
                tracker.update(
                    l, torch.from_numpy(ids)[:, None], torch.from_numpy(weights)[:, None].bfloat16()
                )
            else:
                tracker.update(l, ids[:, None].astype(np.int32), weights[:, None])
            for i, w in routed:
                if 0 <= i < num_experts_L[l] and w != 0:
                    expected[l][i] += 1
    heat = tracker.read()
    for got, want in zip(heat.count_L, expected, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_hits_per_step_are_what_was_routed() -> None:
    tracker = HeatTracker((3,), half_life_steps=10)
    for _ in range(7):
        tracker.step()
        tracker.update(0, np.array([[0, 1], [0, 2]]), np.ones((2, 2)))
    np.testing.assert_allclose(tracker.read().hits_per_step_L[0], [2, 1, 1], rtol=1e-5)
    np.testing.assert_array_equal(HeatTracker((3,), 1).read().hits_per_step_L[0], 0)


def test_steps_taken_together_weigh_the_same() -> None:
    """Routing that does not change is read exactly, whatever the steps between two decays."""
    for num_steps in (1, 4, 30):
        tracker = HeatTracker((3,), half_life_steps=7)
        for _ in range(5):
            tracker.step(num_steps)
            for _ in range(num_steps):
                tracker.update(0, np.array([[0, 1], [0, 2]]), np.ones((2, 2)))
        np.testing.assert_allclose(tracker.read().hits_per_step_L[0], [2, 1, 1], rtol=1e-5)
    once, twice = HeatTracker((1,), 7), HeatTracker((1,), 7)
    for tracker in (once, twice):
        tracker.step()
        tracker.update(0, np.array([[0]]), np.ones((1, 1)))
    once.step(2)
    twice.step()
    twice.step()
    np.testing.assert_allclose(once.read().count_L[0], twice.read().count_L[0], rtol=1e-6)


def test_a_kernel_may_count_into_a_layer() -> None:
    tracker = HeatTracker((2, 3), 5)
    tracker.step()
    tracker.count_E(1)[2] += 4
    tracker.update(1, np.array([[2]]), np.ones((1, 1)))
    assert [count_E.tolist() for count_E in tracker.read().count_L] == [[0, 0], [0, 0, 5]]
    assert tracker.count_E(0).shape == (2,)


def test_update_never_reads_back() -> None:
    """On the meta device any operation that needs a value on the host raises."""
    tracker = HeatTracker((4, 4), 5, device="meta")
    tracker.step()
    tracker.update(1, torch.zeros(3, 2, dtype=torch.int64, device="meta"), torch.ones(3, 2, device="meta"))
    assert tracker.count_N1.shape == (9,)


def test_old_heat_fades() -> None:
    tracker = HeatTracker((2,), half_life_steps=4)
    tracker.step()
    tracker.update(0, np.array([[0]]), np.ones((1, 1)))
    for _ in range(8):
        tracker.step()
    assert tracker.read().count_L[0][0] == pytest.approx(0.25)


@given(st.lists(st.integers(0, 5), max_size=4), st.floats(0, 1e6), st.text(max_size=10))
def test_a_heat_file_gives_back_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], steps: float, model: str
) -> None:
    path = tmp_path_factory.mktemp("heat") / "h.safetensors"
    heat = Heat(model, tuple(np.arange(n, dtype=np.float32) for n in sizes), steps)
    heat.save(path)
    again = Heat.load(path)
    assert (again.model, again.weight_steps) == (model, steps)
    assert len(again.count_L) == len(sizes)
    for a, b in zip(again.count_L, heat.count_L, strict=True):
        np.testing.assert_array_equal(a, b)


def test_merging_is_counting_both() -> None:
    a = Heat("m", (np.array([1, 2], np.float32),), 2.0)
    b = Heat("m", (np.array([3, 0], np.float32),), 6.0)
    merged = a.merge(b)
    np.testing.assert_array_equal(merged.count_L[0], [4, 2])
    np.testing.assert_array_equal(merged.hits_per_step_L[0], [0.5, 0.25])


def test_a_tracker_continues_from_a_record() -> None:
    tracker = HeatTracker((2, 3), 5)
    heat = Heat("m", (np.array([1, 2], np.float32), np.array([3, 4, 5], np.float32)), 7.0)
    tracker.load(heat)
    np.testing.assert_array_equal(tracker.read("m").count_L[1], [3, 4, 5])
    assert tracker.read().weight_steps == 7.0
    with pytest.raises(ValueError, match="has 1 layers of 2 experts, this model has 2 of 2 or 3"):
        tracker.load(Heat("m", (np.zeros(2, np.float32),), 0.0))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a heat file"):
        Heat.load(path)
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="other safetensors"):
        Heat.load(path)
    metadata = {"format": "monde-heat", "version": "9", "model": "m", "weight_steps": "1.0"}
    save_file({"heat.0": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match="heat version 9, expected 1"):
        Heat.load(path)


def test_paths_that_lead_nowhere_name_the_remedy(tmp_path: Path) -> None:
    heat = Heat("m", (np.zeros(2, np.float32),), 1.0)
    with pytest.raises(
        OSError, match=r"heat file .*absent: cannot be read .* model.monde.save_heat\(path\) writes one"
    ):
        Heat.load(tmp_path / "absent")
    with pytest.raises(
        OSError, match=r"nowhere.*: cannot be written .* give a file in a folder that is there"
    ):
        heat.save(tmp_path / "nowhere" / "h.safetensors")
    with pytest.raises(OSError, match=r"cannot be written .* give a file"):
        heat.save(tmp_path)


def test_bad_half_life_is_refused() -> None:
    with pytest.raises(ValueError, match="half_life_steps above 0"):
        HeatTracker((1,), 0)


def routed_heat(popularity_E: np.ndarray, num_steps: int, prompt: int = 0) -> Heat:
    """Four layers of it, eight pairs a step each, after a prompt of so many tokens if any."""
    rng = np.random.default_rng(num_steps)
    tracker = HeatTracker([len(popularity_E)] * 4, 32.0)
    for num_tokens in [*[1] * num_steps, *[prompt] * bool(prompt)]:
        tracker.step()
        for l in range(4):
            ids_TK = rng.choice(len(popularity_E), (num_tokens, 8), p=popularity_E)
            tracker.update(l, ids_TK, np.ones(ids_TK.shape, np.float32))
    return tracker.read()


@pytest.mark.parametrize(("num_steps", "prompt"), [(4, 0), (40, 0), (400, 0), (0, 512), (100, 128)])
def test_equally_popular_experts_are_expected_to_be_equal(num_steps: int, prompt: int) -> None:
    heat = routed_heat(np.full(128, 1 / 128), num_steps, prompt)
    for count_E, likely_E in zip(heat.count_L, heat.likely_count_L, strict=True):
        assert np.ptp(likely_E) < 0.2 * np.ptp(count_E)
        assert likely_E.sum() == pytest.approx(count_E.sum(), rel=1e-4)


def test_popular_experts_stay_popular_and_the_order_as_it_is() -> None:
    popularity_E = 1 / np.arange(1, 65)
    heat = routed_heat(popularity_E / popularity_E.sum(), 200)
    for count_E, likely_E in zip(heat.count_L, heat.likely_count_L, strict=True):
        assert np.ptp(likely_E) > 0.9 * np.ptp(count_E)
        assert np.array_equal(np.argsort(likely_E, kind="stable"), np.argsort(count_E, kind="stable"))


def test_layers_may_differ_and_be_small() -> None:
    for num_experts_L in ((3, 5), (1, 4, 0), (1,)):
        tracker = HeatTracker(num_experts_L, 32)
        assert not any(likely_E.any() for likely_E in tracker.read().likely_count_L)
        tracker.step()
        tracker.update(0, np.zeros((1, 1), int), np.ones((1, 1), np.float32))
        likely_L = tracker.read().likely_count_L
        assert [len(likely_E) for likely_E in likely_L] == list(num_experts_L)
        assert likely_L[0].sum() == pytest.approx(1.0)
