"""The memory plan: never over budget, as many residents as fit, and errors whose numbers are right."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monde.planning.budget import (
    MAX_SPARE_PLACES,
    BudgetError,
    LayerSize,
    MemoryPlan,
    ModelSize,
    plan_memory,
    smallest_gpu_bytes,
)

sizes = st.builds(
    ModelSize,
    dense_bytes=st.integers(0, 1000),
    kv_bytes_per_token=st.integers(0, 5),
    act_bytes_per_token=st.integers(0, 5),
    logits_bytes=st.integers(0, 100),
    staging_bytes_per_token=st.integers(0, 5),
    num_tokens=st.integers(1, 50),
    layers=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 99), st.integers(0, 9), st.integers(0, 3)).map(
            lambda t: LayerSize(t[0], t[1], t[1] + t[2], t[3])
        ),
        min_size=1,
        max_size=5,
    ).map(tuple),
)
budgets = st.integers(0, 5000)


def plan(size: ModelSize, on_gpu: bool, gpu_bytes: int, host_bytes: int) -> MemoryPlan | None:
    try:
        return plan_memory(size, on_gpu, gpu_bytes, host_bytes)
    except BudgetError:
        return None


@given(sizes, st.booleans(), budgets, budgets)
def test_never_over_budget(size: ModelSize, on_gpu: bool, gpu_bytes: int, host_bytes: int) -> None:
    made = plan(size, on_gpu, gpu_bytes, host_bytes)
    if made is not None:
        assert made.gpu_used_bytes <= gpu_bytes
        assert made.host_used_bytes <= host_bytes
        pairs = list(zip(made.num_resident_L, size.layers, strict=True))
        resident_bytes = sum(n * layer.expert_bytes for n, layer in pairs)
        assert resident_bytes + made.host_expert_bytes == size.expert_bytes
        assert made.slots_bytes == sum(n * layer.slot_bytes for n, layer in pairs)
        assert all(0 <= n <= layer.num_experts for n, layer in pairs)
        # No room is left for one more expert anywhere, and layers differ by one unless one is full or too
        # large.
        free_bytes = gpu_bytes - made.gpu_used_bytes
        assert all(n == layer.num_experts or layer.slot_bytes > free_bytes for n, layer in pairs)
        assert "experts" in made.explain()


@given(sizes, st.booleans(), budgets, budgets)
def test_residents_move_with_copies_on_the_host_else_with_spare_places_else_not(
    size: ModelSize, on_gpu: bool, gpu_bytes: int, host_bytes: int
) -> None:
    fixed = plan(size, on_gpu, gpu_bytes, host_bytes)
    if fixed is None:  # wanting moves never makes a plan fail that fits without
        with pytest.raises(BudgetError):
            plan_memory(size, on_gpu, gpu_bytes, host_bytes, wants_moves=True)
        return
    made = plan_memory(size, on_gpu, gpu_bytes, host_bytes, wants_moves=True)
    assert made.num_resident_L == fixed.num_resident_L
    assert made.host_used_bytes <= host_bytes
    movable = [
        (n, layer)
        for n, layer in zip(made.num_resident_L, size.layers, strict=True)
        if 0 < n < layer.num_experts
    ]
    copies_bytes = sum(n * layer.expert_bytes for n, layer in movable)
    kept_bytes = sum(n * layer.kept_bytes for n, layer in movable)
    spare_bytes = sum({layer.expert_bytes for _, layer in movable})
    room_bytes = host_bytes - fixed.host_used_bytes
    assert made.moves == (bool(movable) and room_bytes >= min(copies_bytes, kept_bytes + spare_bytes))
    assert made.releases == (made.moves and room_bytes < copies_bytes)
    if made.releases:
        assert 1 <= made.num_spare_places <= MAX_SPARE_PLACES
        used_bytes = kept_bytes + made.num_spare_places * spare_bytes
        assert made.host_used_bytes == fixed.host_used_bytes + used_bytes
        assert made.num_spare_places == MAX_SPARE_PLACES or room_bytes < used_bytes + spare_bytes
        assert made.num_released == sum(n for n, _ in movable)
        assert made.saved_bytes == copies_bytes - used_bytes > 0
        assert f"host copies of {made.num_released} residents released" in made.explain()
    else:
        assert made.num_spare_places == made.num_released == made.saved_bytes == 0
        assert made.host_used_bytes == fixed.host_used_bytes + (copies_bytes if made.moves else 0)
        assert "released" not in made.explain()
    if movable and not made.moves:
        enough = host_bytes + made.short_for_moves_bytes
        assert f"give host_memory={enough}" in made.explain()
        assert plan_memory(size, on_gpu, gpu_bytes, enough, wants_moves=True).moves
        assert not plan_memory(size, on_gpu, gpu_bytes, enough - 1, wants_moves=True).moves
    assert ("residency: follows the routing" in made.explain()) == made.moves


@given(sizes, st.booleans(), budgets, budgets)
def test_the_smallest_budget_is_what_the_error_says(
    size: ModelSize, on_gpu: bool, gpu_bytes: int, host_bytes: int
) -> None:
    if plan(size, on_gpu, gpu_bytes, host_bytes) is not None:
        return
    with pytest.raises(BudgetError) as caught:
        plan_memory(size, on_gpu, gpu_bytes, host_bytes)
    smallest, message = caught.value.smallest_bytes, str(caught.value)
    assert str(smallest) in message
    shorter = plan(dataclasses.replace(size, num_tokens=1), on_gpu, gpu_bytes, host_bytes)
    assert ("use shorter or fewer sequences (max_context, max_batch)" in message) == (shorter is not None)
    if "gpu_memory of" in message:
        assert smallest > gpu_bytes
        assert plan(size, on_gpu, smallest, 10**9) is not None
        assert plan(size, on_gpu, smallest - 1, 10**9) is None
    else:
        assert smallest > host_bytes
        assert plan(size, on_gpu, gpu_bytes, smallest) is not None
        assert plan(size, on_gpu, gpu_bytes, smallest - 1) is None


@given(sizes, budgets)
def test_the_smallest_gpu_memory_works_and_less_does_not(size: ModelSize, host_bytes: int) -> None:
    smallest = smallest_gpu_bytes(size, host_bytes)
    if smallest is None:
        assert plan(size, True, 10**9, host_bytes) is None
        return
    assert plan(size, True, smallest, host_bytes) is not None
    if len({layer.slot_bytes for layer in size.layers}) <= 1:  # else a larger slot may crowd out smaller ones
        assert plan(size, True, smallest - 1, host_bytes) is None


def test_experts_are_spread_evenly() -> None:
    size = ModelSize(100, 1, 1, 0, 1, 10, (LayerSize(8, 10, 10),) * 3)
    assert plan_memory(size, True, 120 + 50, 10**6).num_resident_L == (2, 2, 1)


def test_the_explanation_names_the_experts_that_are_on_the_host() -> None:
    size = ModelSize(100, 1, 1, 0, 1, 10, (LayerSize(8, 10, 10),))
    for num_slots, experts in (
        (8, "no experts +"),
        (3, "other experts 50 B +"),
        (0, "all experts 80 B +"),
    ):
        made = plan_memory(size, True, 120 + 10 * num_slots, 10**6)
        assert f"host: {experts}" in made.explain()
    assert "all experts 80 B =" in plan_memory(size, False, 0, 10**6).explain()


def test_the_arithmetic_is_in_the_error() -> None:
    size = ModelSize(3 * 2**20, 1024, 512, 0, 64, 1024, (LayerSize(8, 2**20, 2**20),) * 2)
    with pytest.raises(BudgetError) as error:
        plan_memory(size, True, 2**20, 2**30)
    assert str(error.value) == (
        "gpu_memory of 1 MiB is short by 3.5 MiB: dense weights 3 MiB + KV cache of 1024 tokens 1 MiB "
        "+ workspace 512 KiB = 4.5 MiB. Give at least gpu_memory=4718592, "
        'or use device="cpu".'
    )
    with pytest.raises(
        BudgetError, match=r"=4718592, use shorter or fewer sequences .*, or use device=\"cpu\"\.$"
    ):
        plan_memory(size, True, 4 * 2**20, 2**30)


@pytest.mark.parametrize(
    ("num_mib", "remedies"), [(4, "or use a smaller model"), (20, "use shorter or fewer sequences")]
)
def test_the_remedies_on_the_cpu_are_those_that_help(num_mib: int, remedies: str) -> None:
    size = ModelSize(3 * 2**20, 1024, 512, 0, 64, 1024, (LayerSize(8, 2**20, 2**20),) * 2)
    with pytest.raises(BudgetError, match=rf"Give at least host_memory={int(20.5 * 2**20)}, {remedies}"):
        plan_memory(size, False, 0, num_mib * 2**20)
