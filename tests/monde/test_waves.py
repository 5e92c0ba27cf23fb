"""Waves and tiles: every row of every expert in one tile, none of them too large."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from monde.executors.pieces import PackedAt
from monde.executors.waves import Order, Phases, Wave, tiles_of

AT = PackedAt(0, 0, 0)


@given(st.lists(st.integers(0, 900), min_size=1, max_size=12), st.integers(1, 4), st.sampled_from([128, 192]))
def test_tiles_hold_every_row_once(tokens: list[int], num_waves: int, tile_rows: int) -> None:
    tokens_E = np.array(tokens, np.int64)
    experts = np.random.default_rng(len(tokens)).permutation(len(tokens))
    order = Order.of(experts, tokens_E)
    assert order.num_rows == tokens_E.sum()
    parts = [part for part in np.array_split(experts, num_waves) if len(part)]
    # Offsets and rows of biases say whose they are.
    waves = [Wave.of(part, (0, 32), AT, 1000 * part, part, order) for part in parts]
    tiles, num_tiles = tiles_of(waves, tile_rows)
    assert sum(num_tiles) == len(tiles)
    seen_N = np.zeros(order.num_rows, int)
    owner_N = np.full(order.num_rows, -1)
    for e in experts:
        owner_N[order.begin_E[e] : order.begin_E[e] + tokens_E[e]] = e
    for part, of_wave in zip(parts, np.split(tiles, np.cumsum(num_tiles)[:-1]), strict=True):
        for offset, first_row, num_rows, bias_row in of_wave.tolist():
            assert 0 < num_rows <= tile_rows
            assert offset == 1000 * bias_row
            assert bias_row in part
            assert (owner_N[first_row : first_row + num_rows] == bias_row).all()
            seen_N[first_row : first_row + num_rows] += 1
    assert (seen_N == 1).all()


def test_experts_that_others_compute_are_left_out() -> None:
    tokens_E = np.array([3, 5, 0, 7])
    order = Order.of(np.array([3, 2]), tokens_E)
    assert order.begin_E.tolist() == [-1, -1, 7, 0]
    wave = Wave.of(np.arange(4), (0, 32), AT, np.arange(4), np.arange(4), order)
    assert wave.bias_rows_n.tolist() == [3]
    assert tiles_of([], 128)[0].shape == (0, 4)
    other = Wave.of(np.array([2]), (0, 32), AT, np.zeros(1, int), np.zeros(1, int), order)
    assert tiles_of([wave, other], 128)[1] == [1, 0]


def test_phases_add_up() -> None:
    phases = Phases()
    for _ in range(2):
        phases.add([0, 1, 3, 6, 10, 15, 21])
    assert (phases.count_s, phases.count_wait_s, phases.plan_s, phases.combine_s) == (2, 4, 6, 12)
    assert phases.num_layers == 2
