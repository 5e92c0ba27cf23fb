"""Forecasts against bounds worked out by hand, and against the dice they stand for."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from monde.core import Placement
from monde.planning.budget import LayerSize
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.forecast import (
    RESOURCES,
    ModelOutline,
    MoeLayer,
    faster,
    forecast_decode,
    forecast_prefill,
    place_for_decode,
    prefill_layer_s,
    with_one_more_channel,
)
from monde.planning.machines import DESCRIBED
from monde.planning.placement import place_uniform
from monde.planning.share import best_share

SHAPE = ExpertShape(2048, 768)
H200 = DESCRIBED["h200"]
UNIFORM = np.full(128, 1 / 128)
QWEN3_30B = ModelOutline(
    (MoeLayer(SHAPE, 8, UNIFORM, num_ahead=14),) * 48, 48, 2_460_000_000, 2, 98_304, 1.0, 4096, 64, 4096
)


def placed(num_resident: int) -> list[Placement]:
    budget_bytes = 48 * num_resident * 10
    return list(place_uniform([LayerSize(128, 10, 10)] * 48, budget_bytes))


def test_more_slots_are_never_slower() -> None:
    decode = [forecast_decode(QWEN3_30B, placed(n), H200, 1, 512).step_s for n in range(0, 129, 16)]
    prefill = [forecast_prefill(QWEN3_30B, placed(n), H200, 2048).step_s for n in range(0, 129, 16)]
    assert decode == sorted(decode, reverse=True)
    # The last experts of a prompt may be quicker on an idle host than on a busy GPU.
    assert all(more <= 1.01 * fewer for fewer, more in itertools.pairwise(prefill))


def test_all_resident_is_the_floor_of_the_captured_step() -> None:
    """Measured on an H200: a step of 12 layers, all experts resident, takes 1.57 ms."""
    step_s = forecast_decode(QWEN3_30B, placed(128), H200, 1, 576).step_s
    assert step_s - H200.step_s == pytest.approx(4 * 1.57e-3, rel=0.2)


def test_nothing_resident_is_bound_by_host_and_bus_together() -> None:
    cost = CostModel(H200, SHAPE)
    speed = forecast_decode(QWEN3_30B, placed(0), H200, 1, 512)
    assert H200.gpu is not None
    share = best_share(
        float(cost.zero_copy_s(1)) * 8, float(cost.host_s(1)) * 8, H200.gpu.host_while_copying, 0.0, 0.0
    )
    dense_s = forecast_decode(QWEN3_30B, placed(128), H200, 1, 512).step_s
    assert 48 * share.step_s < speed.step_s < 48 * (share.step_s + 40e-6) + dense_s
    assert speed.limit == "host"


def test_without_zero_copy_the_host_reads_everything_cold() -> None:
    layers = tuple(dataclasses.replace(layer, zero_copy=False) for layer in QWEN3_30B.layers)
    alone = forecast_decode(dataclasses.replace(QWEN3_30B, layers=layers), placed(0), H200, 1, 512).step_s
    assert alone - forecast_decode(QWEN3_30B, placed(0), H200, 1, 512).step_s > 48 * 40e-6
    one_layer_s = 8 * float(CostModel(H200, SHAPE).host_s(1))
    assert alone > 48 * one_layer_s


def test_layers_that_seldom_have_cold_experts_seldom_wait_for_the_host() -> None:
    """With one expert of 128 on the host a token meets it in one layer of sixteen."""
    steps_s = [forecast_decode(QWEN3_30B, placed(n), H200, 1, 512).step_s for n in (128, 127)]
    met = 48 * 8 / 128
    assert H200.gpu is not None
    trip_s, own_s = float(H200.gpu.round_trip.seconds(4096)), H200.gpu.decode_layer_s
    least_s, most_s = trip_s - own_s, trip_s + float(CostModel(H200, SHAPE).host_s(1))
    assert met * least_s < steps_s[1] - steps_s[0] < met * most_s


def test_more_sequences_than_decode_takes_are_launched_like_a_prompt() -> None:
    at_64, at_65 = (forecast_decode(QWEN3_30B, placed(128), H200, n, 16).step_s for n in (64, 65))
    assert at_65 > 1.5 * at_64
    assert at_65 > 48 * H200.eager_block_s


def test_every_chunk_of_a_prompt_moves_its_experts_anew() -> None:
    once, twice = (forecast_prefill(QWEN3_30B, placed(0), H200, n).step_s for n in (4096, 8192))
    small = dataclasses.replace(QWEN3_30B, chunk_tokens=1024)
    assert 1.9 * once < twice < 2.3 * once
    assert forecast_prefill(small, placed(0), H200, 4096).step_s > 1.3 * once


def test_what_is_fetched_ahead_saves_no_more_than_its_copies() -> None:
    layer = dataclasses.replace(QWEN3_30B.layers[0], num_ahead=0)
    late_s = prefill_layer_s(layer, placed(0)[0], H200, 2048)
    ahead_s = prefill_layer_s(QWEN3_30B.layers[0], placed(0)[0], H200, 2048)
    copies_s = 14 * float(CostModel(H200, SHAPE).copy_s())
    assert late_s - copies_s < ahead_s < late_s
    between_s = prefill_layer_s(QWEN3_30B.layers[0], placed(0)[0], H200, 2048, between_s=copies_s)
    assert late_s - copies_s < between_s < ahead_s


def test_expected_loads_are_those_of_dice() -> None:
    """Distinct experts that a batch of 16 touches, by the forecast's formula and by drawing."""
    rng = np.random.default_rng(0)
    drawn = [len({e for _ in range(16) for e in rng.choice(128, 8, replace=False)}) for _ in range(400)]
    expected = float((1 - (1 - 8 * UNIFORM) ** 16).sum())
    assert np.mean(drawn) == pytest.approx(expected, rel=0.02)


def test_known_heat_helps_when_placement_follows_it() -> None:
    skewed = np.sort(np.random.default_rng(0).dirichlet(np.full(128, 0.3)))[::-1]
    model = dataclasses.replace(QWEN3_30B, layers=(MoeLayer(SHAPE, 8, skewed),) * 48)
    hot_first = forecast_decode(model, placed(32), H200, 1, 512).step_s
    sizes = [LayerSize(128, 10, 10)] * 48
    chosen = place_for_decode(model, sizes, 48 * 32 * 10, H200, 1)
    assert forecast_decode(model, chosen, H200, 1, 512).step_s == pytest.approx(hot_first)
    cold_first = [Placement(p.slot_of_expert_E[::-1]) for p in placed(32)]
    assert hot_first < 0.7 * forecast_decode(model, cold_first, H200, 1, 512).step_s


@pytest.mark.parametrize("resource", RESOURCES)
@pytest.mark.parametrize("name", DESCRIBED)
def test_faster_hardware_is_never_slower(name: str, resource: str) -> None:
    machine = DESCRIBED[name]
    for speed in (
        forecast_decode(QWEN3_30B, placed(16), machine, 1, 512),
        forecast_prefill(QWEN3_30B, placed(16), machine, 512),
    ):
        assert 1 - 1e-9 <= speed.gain[resource] <= 1.1 + 1e-9


def test_without_gpu_everything_is_host() -> None:
    machine = dataclasses.replace(H200, gpu=None)
    speed = forecast_decode(QWEN3_30B, placed(0), machine, 1, 0)
    reads_s = (2.46e9 + 48 * 8 * SHAPE.expert_bytes) / machine.host_expert.bytes_per_s
    own_s = machine.step_s + 48 * (machine.eager_block_s + machine.host_call_s)
    assert speed.step_s == pytest.approx(reads_s + own_s, rel=0.02)
    assert forecast_prefill(QWEN3_30B, placed(0), machine, 128).tokens_per_s > speed.tokens_per_s


def test_unknown_resources_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of host, bus, GPU, launches"):
        faster(H200, "luck", 2.0)


def test_one_more_channel_is_that_share_of_the_host() -> None:
    laptop = dataclasses.replace(DESCRIBED["laptop-4060"], gpu=None)
    more = with_one_more_channel(laptop)
    assert more is not None
    assert more.memory_channels is not None
    assert more.memory_channels.num_channels == 3
    assert more.host_expert.bytes_per_s == pytest.approx(1.5 * laptop.host_expert.bytes_per_s)
    assert more.host_expert.flops_per_s.y[-1] == laptop.host_expert.flops_per_s.y[-1]
    assert with_one_more_channel(H200) is None


def test_a_prompt_of_residents_alone_waits_for_no_plan() -> None:
    """Where all experts have slots Python's part is short, and the GPU's products are what counts."""
    assert H200.gpu is not None
    prompt = dataclasses.replace(H200.gpu.prompt, plan_s=1.0, layer_s=1.0)
    slow = dataclasses.replace(H200, gpu=dataclasses.replace(H200.gpu, prompt=prompt))
    assert forecast_prefill(QWEN3_30B, placed(128), slow, 512).step_s < 1
    assert forecast_prefill(QWEN3_30B, placed(127), slow, 512).step_s > 48
