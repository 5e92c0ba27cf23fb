"""Parts of a forward: some rows of F of an expert, some of the experts. With the others they add up to the whole one."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hostcompute import Activation, ActivationKind, Cut, DType, ExpertBank, ExpertSpec
from tests.hostcompute.bounds import assert_within
from tests.hostcompute.cases import Batch, expected, host_array, load_all, make_batch, make_expert, sliced

pytest.importorskip("hostcompute._native")


def other_part(expert: dict[str, object], spec: ExpertSpec, cut: Cut) -> dict[str, object]:
    """The expert with rows [first_row, F) of F gone: what somebody else computes."""
    part = dict(expert)
    for name in ("gate", "up"):
        if name in part:
            part[name] = sliced(part[name], np.s_[: cut.first_row])  # type: ignore[arg-type]
        if f"{name}_bias" in part:
            part[f"{name}_bias"] = sliced(part[f"{name}_bias"], np.s_[: cut.first_row])  # type: ignore[arg-type]
    part["down"] = sliced(part["down"], np.s_[:, : cut.first_row])  # type: ignore[arg-type]
    return part


@pytest.mark.parametrize("x_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("first_row", [32, 64, 96])
def test_both_parts_make_the_whole(dtype: DType, x_dtype: str, first_row: int) -> None:
    rng = np.random.default_rng(first_row)
    for gated, num_tokens in ((True, 1), (True, 40), (False, 9), (True, 300)):
        activation = Activation(ActivationKind.SILU if gated else ActivationKind.RELU)
        spec = ExpertSpec(3, 72, 104, dtype, gated, activation, has_bias=True)
        small = ExpertSpec(3, 72, first_row, dtype, gated, activation, has_bias=True)
        experts = {e: make_expert(rng, spec, "separate") for e in range(3)}
        batch, cut = make_batch(rng, spec, num_tokens, 2, x_dtype), Cut(1, first_row)
        bank = load_all(ExpertBank(spec, "native"), experts)
        rest = ExpertBank(small, "native")
        rest.load(1, **other_part(experts[1], spec, cut))
        one = Batch(batch.x_TD, np.where(batch.ids_TK == 1, 1, -1), batch.weights_TK)
        outs = [host_array(np.full((num_tokens, 72), np.nan), "f32") for _ in range(2)]
        bank.submit(*batch.arguments, out=outs[0], cut=cut).wait()
        rest.submit(*one.arguments, out=outs[1]).wait()
        y_TD = outs[0].float32() + outs[1].float32()
        bf16_dots = dtype is DType.BF16 and x_dtype == "bf16"
        assert_within(y_TD, expected(spec, experts, batch, "f32", bf16_dots), f"{spec}, T={num_tokens}")
        whole = host_array(np.zeros((num_tokens, 72)), "f32")
        bank.forward(*batch.arguments, out=whole)
        if (one.ids_TK == 1).any() and num_tokens > 1:
            assert not np.array_equal(whole.float32(), outs[0].float32())


@pytest.mark.parametrize("num_tokens", [1, 5, 40, 300])
def test_experts_in_two_goes_make_the_whole(num_tokens: int) -> None:
    """The second waits for the first and adds to it; whose pairs nobody wants need not be loaded."""
    rng = np.random.default_rng(num_tokens)
    spec = ExpertSpec(6, 72, 104, DType.BF16)
    experts = {e: make_expert(rng, spec, "separate") for e in range(5)}
    bank, batch = load_all(ExpertBank(spec, "native"), experts), make_batch(rng, spec, num_tokens, 3, "bf16")
    wanted = Batch(batch.x_TD, np.where(batch.ids_TK == 5, -1, batch.ids_TK), batch.weights_TK)
    for _ in range(20):
        first_E = rng.random(6) < 0.5
        first_E[5] = False
        rest_E = ~first_E & (np.arange(6) < 5)
        out = host_array(np.full((num_tokens, 72), np.nan), "f32")
        both = (
            bank.submit(*batch.arguments, out=out, experts_E=first_E),
            bank.submit(*batch.arguments, out=out, experts_E=rest_E, adds=True),
        )
        for pending in both:
            pending.wait()
        assert_within(
            out.float32(), expected(spec, experts, wanted, "f32", True), f"{first_E}, T={num_tokens}"
        )
        counted = [np.isin(batch.ids_TK, np.flatnonzero(mask_E)).sum() for mask_E in (first_E, rest_E)]
        assert [pending.counts.num_pairs for pending in both if pending.counts] <= counted


def test_wrong_parts_are_refused() -> None:
    rng = np.random.default_rng(0)
    spec = ExpertSpec(2, 16, 64)
    bank = load_all(ExpertBank(spec, "native"), {e: make_expert(rng, spec, "separate") for e in range(2)})
    batch, out = make_batch(rng, spec, 3, 2), host_array(np.zeros((3, 16)), "f32")
    for wrong in (np.ones(3, bool), np.ones(2, np.uint8), np.ones(4, bool)[::2], np.ones((1, 2), bool)):
        with pytest.raises(ValueError, match=r"experts_E: expected \(2,\) bools in a row, got \("):
            bank.submit(*batch.arguments, out=out, experts_E=wrong)
    with pytest.raises(ValueError, match="adds: expected an out to add to"):
        bank.submit(*batch.arguments, adds=True)
    with pytest.raises(ValueError, match="adds: expected an out of float32, got bf16"):
        bank.submit(*batch.arguments, out=host_array(np.zeros((3, 16)), "bf16"), adds=True)
    other = load_all(ExpertBank(spec, "numba"), {e: make_expert(rng, spec, "separate") for e in range(2)})
    with pytest.raises(ValueError, match="only the native backend computes parts"):
        other.submit(*batch.arguments, out=out, experts_E=np.ones(2, bool))


def test_bad_cuts_are_refused() -> None:
    rng = np.random.default_rng(0)
    spec = ExpertSpec(2, 16, 64)
    bank = load_all(ExpertBank(spec, "native"), {e: make_expert(rng, spec, "separate") for e in range(2)})
    batch = make_batch(rng, spec, 3, 2)
    for first_row in (0, 16, 64, 80):
        with pytest.raises(ValueError, match=r"expected a multiple of 32 in 1\.\.63"):
            bank.submit(*batch.arguments, out=host_array(np.zeros((3, 16)), "f32"), cut=Cut(0, first_row))
    other = load_all(ExpertBank(spec, "reference"), {e: make_expert(rng, spec, "separate") for e in range(2)})
    with pytest.raises(ValueError, match="only the native backend computes parts"):
        other.submit(*batch.arguments, out=host_array(np.zeros((3, 16)), "f32"), cut=Cut(0, 32))


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_waiting_has_an_end_and_says_what_it_took(backend: str) -> None:
    rng = np.random.default_rng(1)
    spec = ExpertSpec(2, 16, 64)
    bank = load_all(ExpertBank(spec, backend), {e: make_expert(rng, spec, "separate") for e in range(2)})
    batch = make_batch(rng, spec, 3, 2)
    start_s = time.perf_counter()
    pending = bank.submit(*batch.arguments, out=host_array(np.zeros((3, 16)), "f32"))
    assert pending.wait_for(60.0)
    pending.wait()
    assert 0 < pending.busy_s <= time.perf_counter() - start_s
