"""Every backend and ISA against the float64 oracle, within derived bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostcompute import Activation, ActivationKind, DType, ExpertBank, ExpertSpec
from tests.hostcompute.bounds import assert_within
from tests.hostcompute.cases import LAYOUTS, expected, forward, load_all, make_batch, make_expert
from tests.hostcompute.conftest import Contender


@st.composite
def specs(draw: st.DrawFn) -> ExpertSpec:
    kind = draw(st.sampled_from(ActivationKind))
    limits = [0.5, 7.0] + [float("inf")] * (kind is not ActivationKind.SWIGLU_SOFTCAP)
    return ExpertSpec(
        num_experts=draw(st.integers(1, 5)),
        d_model=draw(st.integers(1, 200)),
        d_ffn=draw(st.integers(1, 200)),
        dtype=draw(st.sampled_from(DType)),
        gated=kind.needs_gate or draw(st.booleans()),
        activation=Activation(kind, limit=draw(st.sampled_from(limits)), alpha=1.702),
        has_bias=draw(st.booleans()),
    )


FLOATS = st.sampled_from(["f32", "bf16", "f16"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    spec=specs(),
    layout=st.sampled_from(LAYOUTS),
    num_tokens=st.one_of(st.integers(0, 9), st.sampled_from([16, 17, 33, 70])),
    top_k=st.integers(1, 8),
    x_dtype=FLOATS,
    weights_dtype=FLOATS,
    out_dtype=FLOATS,
    ids_dtype=st.sampled_from(["int32", "int64"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(
    contender: Contender,
    spec: ExpertSpec,
    layout: str,
    num_tokens: int,
    top_k: int,
    x_dtype: str,
    weights_dtype: str,
    out_dtype: str,
    ids_dtype: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    experts = {e: make_expert(rng, spec, layout) for e in range(spec.num_experts)}
    batch = make_batch(rng, spec, num_tokens, top_k, x_dtype, weights_dtype, ids_dtype)
    with contender.bank(spec) as bank:
        y_TD = forward(load_all(bank, experts), batch, out_dtype)
    assert_within(
        y_TD,
        expected(spec, experts, batch, out_dtype, contender.bf16_dots(spec, x_dtype)),
        f"{spec}, {layout}",
    )


@pytest.mark.parametrize("kind", list(ActivationKind))
@pytest.mark.parametrize("dtype", list(DType))
def test_large_pre_activations(contender: Contender, kind: ActivationKind, dtype: DType) -> None:
    """Where exp overflows and tanh saturates."""
    rng = np.random.default_rng(3)
    spec = ExpertSpec(
        2, 48, 40, dtype, activation=Activation(kind, limit=7.0 if kind.needs_gate else float("inf"))
    )
    experts = {e: make_expert(rng, spec, "separate") for e in range(2)}
    batch = make_batch(rng, spec, 6, 2)
    batch.x_TD.numpy()[...] *= 60
    with contender.bank(spec) as bank:
        y_TD = forward(load_all(bank, experts), batch)
    assert_within(y_TD, expected(spec, experts, batch, "f32", bf16_dots=False), kind.value)


def test_subnormal_and_largest_f16_weights(contender: Contender) -> None:
    """Every finite f16 pattern is widened exactly: one expert is a table of them."""
    spec = ExpertSpec(1, 256, 256, DType.F16, gated=False, activation=Activation(ActivationKind.RELU))
    patterns = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    patterns[(patterns & 0x7C00) == 0x7C00] = 0
    up_FD = patterns.view(np.float16).reshape(256, 256)
    down_DF = np.eye(256, dtype=np.float16)
    x_TD = np.eye(256, dtype=np.float32)
    ids_T1, ones_T1 = np.zeros((256, 1), np.int64), np.ones((256, 1), np.float32)
    with contender.bank(spec) as bank:
        bank.load(0, up=up_FD, down=down_DF)
        y_TD = bank.forward(x_TD, ids_T1, ones_T1)
    np.testing.assert_array_equal(y_TD, np.maximum(up_FD.T.astype(np.float32), 0))


def test_ids_out_of_range_and_weight_0_are_ignored(backend: str) -> None:
    rng = np.random.default_rng(0)
    spec = ExpertSpec(4, 32, 16, DType.F32)
    x_TD = rng.standard_normal((5, 32)).astype(np.float32)
    ids_TK = np.array([[-1, 4], [2**31 - 1, -(2**31)], [1, 1], [0, 3], [2, 2]])
    weights_TK = np.ones((5, 2), np.float32)
    weights_TK[3:] = 0
    with ExpertBank(spec, backend) as bank:
        bank.load(1, **make_expert(rng, spec, "separate"))  # the only one that is needed
        y_TD = bank.forward(x_TD, ids_TK, weights_TK)
    assert np.all(y_TD[[0, 1, 3, 4]] == 0)
    assert np.all(y_TD[2] != 0)


def test_repeated_experts_add_up(contender: Contender) -> None:
    rng = np.random.default_rng(0)
    spec = ExpertSpec(3, 40, 24)
    experts = {e: make_expert(rng, spec, "separate") for e in range(3)}
    batch = make_batch(rng, spec, 4, 3)
    batch.ids_TK[...] = [[0, 0, 0], [1, 0, 1], [2, 2, 1], [0, 1, 2]]
    with contender.bank(spec) as bank:
        y_TD = forward(load_all(bank, experts), batch)
    assert_within(y_TD, expected(spec, experts, batch, "f32", bf16_dots=False), "repeated experts")


def test_the_bound_is_not_vacuous() -> None:
    """One weight off by one bf16 ulp at the largest element must be caught, or the bound proves nothing."""
    rng = np.random.default_rng(0)
    spec = ExpertSpec(1, 64, 64)
    experts = {0: make_expert(rng, spec, "separate")}
    batch = make_batch(rng, spec, 3, 1)
    batch.ids_TK[...] = 0
    batch.weights_TK.numpy()[...] = 1
    honest = expected(spec, experts, batch, "f32", bf16_dots=False)
    bits_DF = experts[0]["down"].numpy()
    bits_DF[5, 7] += 1
    with ExpertBank(spec, "reference") as bank:
        y_TD = forward(load_all(bank, experts), batch)
    with pytest.raises(AssertionError, match=r"y\[\d, 5\] is .* times the bound"):
        assert_within(y_TD, honest, "planted")
