"""ExpertBank beside the arithmetic: weights in and out, errors, life, forms of input."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from hostcompute import Activation, ActivationKind, DType, ExpertBank, ExpertSpec
from hostcompute.backends.select import choose
from tests.hostcompute.bounds import assert_within
from tests.hostcompute.cases import (
    LAYOUTS,
    expected,
    forward,
    host_array,
    load_all,
    make_batch,
    make_expert,
    sliced,
)
from tests.hostcompute.conftest import BF16_DOT_ISAS

SPEC = ExpertSpec(num_experts=3, d_model=24, d_ffn=20)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def loaded_bank(backend: str, spec: ExpertSpec = SPEC) -> ExpertBank:
    generator = rng()
    return load_all(
        ExpertBank(spec, backend),
        {e: make_expert(generator, spec, "separate") for e in range(spec.num_experts)},
    )


# ---- weights in and out ----
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("gated", [True, False])
def test_export_returns_what_was_loaded(backend: str, layout: str, dtype: DType, gated: bool) -> None:
    spec = ExpertSpec(2, 37, 53, dtype, gated=gated, has_bias=True)
    expert = make_expert(rng(), spec, layout)
    with ExpertBank(spec, backend) as bank:
        bank.load(1, **expert)
        exported = vars(bank.export(1))
    for name, array in expert.items():
        if name.endswith("_bias"):
            np.testing.assert_array_equal(exported[name].float32(), array.float32())
        else:
            np.testing.assert_array_equal(exported[name].numpy(), array.numpy())
            assert exported[name].dtype == dtype.value
            assert exported[name].is_contiguous


def test_export_is_a_copy(backend: str) -> None:
    with loaded_bank(backend) as bank:
        batch = make_batch(rng(), SPEC, 3, 2)
        before = forward(bank, batch)
        bank.export(0).up.numpy()[...] = 0
        np.testing.assert_array_equal(forward(bank, batch), before)


def test_load_rounds_to_the_type_of_the_bank(backend: str) -> None:
    expert = {"up": np.full((20, 24), 1 + 2.0**-9, np.float32), "down": np.ones((24, 20), np.float32)}
    with ExpertBank(ExpertSpec(1, 24, 20, DType.BF16, gated=False), backend) as bank:
        bank.load(0, **expert)
        assert np.all(bank.export(0).up.float32() == 1)


def test_load_replaces_and_release_forgets(backend: str) -> None:
    batch = make_batch(rng(), SPEC, 3, 2)
    batch.ids_TK[...] = 1
    batch.weights_TK.numpy()[...] = 1
    with loaded_bank(backend) as bank, loaded_bank(backend) as other:
        bank.load(1, **make_expert(np.random.default_rng(99), SPEC, "separate"))
        assert not np.array_equal(forward(bank, batch), forward(other, batch))
        bank.release(1)
        assert bank.loaded_experts == {0, 2}
        with pytest.raises(KeyError, match=r"1.*never loaded"):
            forward(bank, batch)
        bank.load(1, **make_expert(np.random.default_rng(99), SPEC, "separate"))
        forward(bank, batch)


def test_resident_bytes_follow_the_experts(backend: str) -> None:
    with loaded_bank(backend) as bank:
        assert bank.resident_bytes >= 3 * SPEC.expert_bytes
    assert bank.resident_bytes == 0


# ---- forms of input ----
def test_numpy_torch_and_dlpack_agree(backend: str) -> None:
    torch = pytest.importorskip("torch")
    spec = ExpertSpec(2, 24, 20, DType.F32)
    generator = rng()
    experts = {e: make_expert(generator, spec, "separate") for e in range(2)}
    x_TD = generator.standard_normal((4, 24)).astype(np.float32)
    ids_TK = np.array([[0, 1], [1, 0], [1, 1], [0, 7]])
    weights_TK = generator.random((4, 2)).astype(np.float32)

    class OnlyDlpack:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __dlpack__(self, **kwargs: Any) -> Any:
            return self.array.__dlpack__(**kwargs)

        def __dlpack_device__(self) -> Any:
            return self.array.__dlpack_device__()

    answers = []
    for wrap in (lambda a: a, torch.from_numpy, OnlyDlpack):
        with ExpertBank(spec, backend) as bank:
            for e, expert in experts.items():
                bank.load(e, **{name: wrap(array.numpy().copy()) for name, array in expert.items()})
            out = np.empty_like(x_TD)
            bank.forward(wrap(x_TD), wrap(ids_TK), wrap(weights_TK), out=wrap(out))
        answers.append(out)
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


def test_torch_bfloat16_in_and_out(backend: str) -> None:
    torch = pytest.importorskip("torch")
    generator = rng()
    experts = {e: make_expert(generator, SPEC, "separate") for e in range(SPEC.num_experts)}
    batch = make_batch(generator, SPEC, 5, 2, x_dtype="bf16", weights_dtype="bf16")
    with load_all(ExpertBank(SPEC, backend), experts) as bank:
        x_TD, weights_TK = (
            torch.from_numpy(array.numpy()).view(torch.bfloat16) for array in (batch.x_TD, batch.weights_TK)
        )
        y_TD = bank.forward(x_TD, torch.from_numpy(batch.ids_TK), weights_TK)
        bf16_dots = bank.choice.isa in BF16_DOT_ISAS
    assert y_TD.dtype is torch.bfloat16
    want = expected(SPEC, experts, batch, "bf16", bf16_dots)
    assert_within(y_TD.float().numpy(), want, f"{backend}, torch bf16")


def test_ml_dtypes_bfloat16(backend: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    batch = make_batch(rng(), SPEC, 2, 2, x_dtype="bf16")
    with loaded_bank(backend) as bank:
        x_TD = batch.x_TD.numpy().view(ml_dtypes.bfloat16)
        y_TD = bank.forward(x_TD, batch.ids_TK, batch.weights_TK.numpy())
        assert y_TD.dtype == x_TD.dtype
        np.testing.assert_array_equal(y_TD.astype(np.float32), forward(bank, batch, "bf16"))


def test_strided_batch(backend: str) -> None:
    """x, ids, weights and out as views with gaps and transposed strides."""
    generator = rng()
    with loaded_bank(backend) as bank:
        x_TD = generator.standard_normal((24, 10)).astype(np.float32).T[::2]
        ids_TK = generator.integers(0, 3, (4, 10)).astype(np.int32).T[::2, 1:3]
        weights_TK = generator.random((5, 6)).astype(np.float32)[:, ::3]
        out = np.zeros((5, 30), np.float32)[:, 3:27]
        bank.forward(x_TD, ids_TK, weights_TK, out=out)
        plain = bank.forward(x_TD.copy(order="C"), ids_TK.copy(), weights_TK.copy())
        np.testing.assert_array_equal(out, plain)


def test_no_tokens_and_no_pairs(backend: str) -> None:
    with ExpertBank(SPEC, backend) as bank:  # nothing is loaded and nothing is needed
        assert bank.forward(
            np.empty((0, 24), np.float32), np.empty((0, 2), np.int64), np.empty((0, 2), np.float32)
        ).shape == (0, 24)
        y_TD = bank.forward(
            np.ones((3, 24), np.float32), np.empty((3, 0), np.int64), np.empty((3, 0), np.float32)
        )
        assert np.all(y_TD == 0)


# ---- errors ----
@pytest.mark.parametrize("name", ["gate", "up", "down"])
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(backend: str, name: str, dtype: DType, value: float) -> None:
    spec = ExpertSpec(3, 24, 20, dtype)
    expert = make_expert(rng(), spec, "interleaved")
    values = expert[name].float32()
    values[17, 5] = values[18, 3] = value
    expert[name] = host_array(values, dtype.value)
    with ExpertBank(spec, backend) as bank:
        with pytest.raises(
            ValueError, match=rf"\[load\] expert 2: a weight is NaN or infinite: {name}\[17, 5\]"
        ):
            bank.load(2, **expert)
        assert bank.loaded_experts == frozenset()


def test_weights_too_large_for_the_bank_are_refused(backend: str) -> None:
    with (
        ExpertBank(ExpertSpec(1, 4, 4, DType.F16, gated=False), backend) as bank,
        pytest.raises(ValueError, match=r"up\[0, 0\]"),
    ):
        bank.load(0, up=np.full((4, 4), 1e6, np.float32), down=np.ones((4, 4), np.float32))


def test_a_failed_load_keeps_the_old_expert(backend: str) -> None:
    batch = make_batch(rng(), SPEC, 3, 2)
    with loaded_bank(backend) as bank:
        before = forward(bank, batch)
        broken = make_expert(rng(), SPEC, "separate")
        broken["down"] = host_array(np.full((24, 20), np.nan), "bf16")
        with pytest.raises(ValueError, match=r"expert 0: .*down\[0, 0\]"):
            bank.load(0, **broken)
        np.testing.assert_array_equal(forward(bank, batch), before)


def test_missing_experts_are_named(backend: str) -> None:
    with ExpertBank(ExpertSpec(9, 24, 20), backend) as bank:
        bank.load(4, **make_expert(rng(), SPEC, "separate"))
        ids_TK = np.array([[4, 7], [2, 4]])
        with pytest.raises(KeyError, match=r"[27].*never loaded"):
            bank.forward(np.ones((2, 24), np.float32), ids_TK, np.ones((2, 2), np.float32))
        with pytest.raises(KeyError, match=r"3.*never loaded"):
            bank.export(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"up": np.ones((20, 23), np.float32)}, ValueError, r"up: expected shape \(20, 24\), got \(20, 23\)"),
        ({"gate": None}, ValueError, "gate: expected an array"),
        ({"up_bias": np.ones(20, np.float32)}, ValueError, "keeps no biases"),
        (
            {"down": np.ones((24, 20), np.int64)},
            ValueError,
            "down: expected float32, bfloat16 or float16, got int64; convert it to float32",
        ),
        ({"down": np.ones((24, 20), np.complex64)}, ValueError, "down: .* got complex64; convert it"),
        ({"down": np.ones((24, 20))}, ValueError, "down: .* got float64; convert it to float32"),
        ({"down": [[1.0]]}, TypeError, r"expected a NumPy array.* got list; wrap it: numpy.asarray"),
    ],
)
def test_load_refuses(backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with ExpertBank(SPEC, backend) as bank, pytest.raises(error, match=message):
        bank.load(0, **{**make_expert(rng(), SPEC, "separate"), **change})


@pytest.mark.parametrize("expert_id", [-1, 3, 2**40, 1.5, "0", None])
def test_expert_ids_are_checked(backend: str, expert_id: Any) -> None:
    with loaded_bank(backend) as bank:
        for use in (
            lambda: bank.load(expert_id, **make_expert(rng(), SPEC, "separate")),
            lambda: bank.release(expert_id),
            lambda: bank.export(expert_id),
        ):
            with pytest.raises(ValueError, match=r"expert_id: expected 0\.\.2, got"):
                use()
        assert bank.loaded_experts == {0, 1, 2}


def test_out_that_cannot_be_written_is_refused(backend: str) -> None:
    torch = pytest.importorskip("torch")
    locked = np.zeros((3, 24), np.float32)
    locked.flags.writeable = False
    x_TD, ids_TK, weights_TK = (
        np.ones((3, 24), np.float32),
        np.zeros((3, 2), int),
        np.ones((3, 2), np.float32),
    )
    with loaded_bank(backend) as bank:
        with pytest.raises(
            ValueError, match="out: expected an array to write to, got a read-only one; copy it"
        ):
            bank.forward(x_TD, ids_TK, weights_TK, out=locked)
        with pytest.raises(ValueError, match="out: expected rows of unit stride that do not overlap"):
            bank.forward(x_TD, ids_TK, weights_TK, out=torch.zeros(24).expand(3, 24))
        bank.forward(x_TD[:1], ids_TK[:1], weights_TK[:1], out=torch.zeros(24).expand(1, 24))
    assert not locked.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TD": np.ones((3, 23), np.float32)}, r"x: expected shape \(T, 24\)"),
        ({"x_TD": np.ones((3, 24), np.float64)}, "x: .* got float64; convert it to float32"),
        ({"topk_weights_TK": np.ones((3, 2))}, "topk_weights: .* got float64; convert it to float32"),
        ({"topk_ids_TK": np.zeros((2, 2), np.int64)}, r"topk_ids: expected shape \(3, K\)"),
        (
            {"topk_ids_TK": np.zeros((3, 2), np.float32)},
            "topk_ids: expected int64 or int32, got float32; convert it to int64",
        ),
        ({"topk_ids_TK": np.zeros((3, 2), np.uint8)}, "topk_ids: .* got uint8; convert it to int64"),
        ({"topk_ids_TK": np.zeros((3, 2), np.int16)}, "topk_ids: .* got int16; convert it to int64"),
        ({"topk_ids_TK": np.zeros((3, 2), np.uint64)}, "topk_ids: .* got uint64; convert it to int64"),
        ({"topk_ids_TK": np.zeros((3, 2), bool)}, "topk_ids: .* got bool; convert it to int64"),
        ({"topk_ids_TK": np.zeros((3, 2), ">i8")}, "topk_ids: >i8 has another byte order .* to int64"),
        ({"x_TD": np.ones((3, 24), ">f4")}, "x: >f4 has another byte order .* convert it to float32"),
        ({"topk_weights_TK": np.ones((3, 1), np.float32)}, r"topk_weights: expected shape \(3, 2\)"),
        ({"out": np.ones((3, 25), np.float32)}, r"out: expected shape \(3, 24\)"),
        ({"out": np.ones((24, 3), np.float32).T}, "out: expected rows of unit stride"),
    ],
)
def test_forward_refuses(backend: str, change: dict[str, Any], message: str) -> None:
    batch: dict[str, Any] = {
        "x_TD": np.ones((3, 24), np.float32),
        "topk_ids_TK": np.zeros((3, 2), np.int64),
        "topk_weights_TK": np.ones((3, 2), np.float32),
    }
    with loaded_bank(backend) as bank, pytest.raises(ValueError, match=message):
        bank.forward(**{**batch, **change})


def test_torch_tensors_whose_bytes_are_not_their_values_are_refused(backend: str) -> None:
    torch = pytest.importorskip("torch")
    x_TD, ids_TK, weights_TK = torch.ones(3, 24), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    with loaded_bank(backend) as bank:
        with pytest.raises(ValueError, match=r"x: a view that torch negates .* call .resolve_neg\(\) first"):
            bank.forward(torch._neg_view(x_TD), ids_TK, weights_TK)
        with pytest.raises(ValueError, match=r"topk_ids: .* got uint8; convert it to int64"):
            bank.forward(x_TD, ids_TK.to(torch.uint8), weights_TK)


def test_dlpack_that_numpy_cannot_read_is_refused(backend: str) -> None:
    torch = pytest.importorskip("torch")

    class OnlyDlpack:
        def __dlpack__(self, **kwargs: Any) -> Any:
            return torch.ones(1, 24, dtype=torch.bfloat16).__dlpack__(**kwargs)

        def __dlpack_device__(self) -> Any:
            return (1, 0)

    out = np.zeros((1, 24), np.float32)
    with (
        loaded_bank(backend) as bank,
        pytest.raises(ValueError, match=r"x: NumPy cannot read this OnlyDlpack \(.*torch.from_dlpack"),
    ):
        bank.forward(OnlyDlpack(), np.zeros((1, 1), int), np.ones((1, 1), np.float32), out=out)


def test_out_may_be_x(backend: str) -> None:
    x_TD, ids_TK, weights_TK = rng().standard_normal((5, 24)), np.array([[0, 1]] * 5), np.ones((5, 2))
    x_TD, weights_TK = x_TD.astype(np.float32), weights_TK.astype(np.float32)
    with loaded_bank(backend) as bank:
        apart = bank.forward(x_TD, ids_TK, weights_TK)
        np.testing.assert_array_equal(bank.forward(x_TD, ids_TK, weights_TK, out=x_TD), apart)


def test_lists_are_refused(backend: str) -> None:
    with loaded_bank(backend) as bank, pytest.raises(TypeError, match=r"got list; wrap it: numpy.asarray"):
        bank.forward(np.ones((1, 24), np.float32), [[0]], np.ones((1, 1), np.float32))
    with (
        loaded_bank(backend) as bank,
        pytest.raises(TypeError, match=r"\[forward\] out: .* pass out=, or NumPy"),
    ):
        bank.forward([[1.0] * 24], [[0]], [[1.0]])


def test_ids_of_no_expert_contribute_zero(backend: str) -> None:
    x_TD, ones_TK = np.ones((2, 24), np.float32), np.ones((2, 2), np.float32)
    with loaded_bank(backend) as bank:
        alone = bank.forward(x_TD, np.array([[1], [2]]), ones_TK[:, :1])
        for no_expert in (-1, 3, -(2**40), 2**40):
            mixed = bank.forward(x_TD, np.array([[1, no_expert], [no_expert, 2]]), ones_TK)
            np.testing.assert_array_equal(mixed, alone)
            assert bank.last_counts is not None
            assert bank.last_counts.num_pairs == 2
        assert not bank.forward(x_TD, np.full((2, 2), 3), ones_TK).any()


def test_a_bank_larger_than_the_machine_is_refused_at_once(backend: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"1024 experts of D=65536, F=65536 in bf16 take .* GiB, this machine has .* use fewer",
    ):
        ExpertBank(ExpertSpec(1024, 65536, 65536), backend)


def test_closed_bank(backend: str) -> None:
    bank = loaded_bank(backend)
    bank.close()
    bank.close()
    batch = make_batch(rng(), SPEC, 2, 1)
    for use in (
        lambda: forward(bank, batch),
        lambda: bank.submit(*batch.arguments, out=batch.x_TD),
        lambda: bank.export(0),
        lambda: bank.release(0),
        lambda: bank.load(0, **make_expert(rng(), SPEC, "separate")),
    ):
        with pytest.raises(RuntimeError, match="closed and its experts are gone; build a new one and load"):
            use()


def test_a_forward_under_way_outlives_the_bank(backend: str) -> None:
    batch = make_batch(rng(), SPEC, 4, 2)
    with loaded_bank(backend) as bank:
        want = forward(bank, batch)
        out = host_array(np.zeros(batch.x_TD.shape), "f32")
        pending = bank.submit(*batch.arguments, out=out)
    np.testing.assert_array_equal(pending.wait().float32(), want)


@pytest.mark.parametrize("use", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_bank_cannot_be_copied(backend: str, use: Any) -> None:
    with loaded_bank(backend) as bank, pytest.raises(TypeError, match=r"load what export\(expert_id\) gives"):
        use(bank)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": {"num_experts": 3}}, "spec: expected an ExpertSpec, got dict"),
        ({"pool": 2}, r"pool: expected one from make_pool\(num_threads\), got int"),
        ({"places": 4}, "places: expected HostPlaces, got int"),
    ],
)
def test_a_bank_of_something_else_is_refused(backend: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ExpertBank(**{"spec": SPEC, "backend": backend, **change})


@pytest.mark.parametrize("name", ["num_experts", "d_model", "d_ffn"])
def test_spec_refuses_empty_dimensions(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        ExpertSpec(**{"num_experts": 1, "d_model": 1, "d_ffn": 1, name: 0})


@pytest.mark.parametrize("value", [2.5, "2", 2**31])
def test_spec_refuses_what_is_no_size(value: Any) -> None:
    with pytest.raises(ValueError, match=r"num_experts must be a whole number below 2\*\*31"):
        ExpertSpec(value, 1, 1)


@pytest.mark.parametrize(("name", "kind"), [("dtype", "DType"), ("activation", "Activation")])
def test_spec_refuses_names_of_types(name: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be of {kind}, got 'bf16'"):
        ExpertSpec(1, 1, 1, **{name: "bf16"})


def test_clamped_activations_need_a_gate() -> None:
    with pytest.raises(ValueError, match="needs gated=True"):
        ExpertSpec(1, 1, 1, gated=False, activation=Activation(ActivationKind.SWIGLU_ALPHA))


@pytest.mark.parametrize("constants", [{}, {"limit": 7.0, "alpha": 0.0}, {"limit": -1.0}])
def test_caps_must_be_finite_and_positive(constants: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="swiglu_softcap"):
        Activation(ActivationKind.SWIGLU_SOFTCAP, **constants)


def test_sliced_views_share_memory() -> None:
    """The layouts above are views, as they are in a mapped checkpoint."""
    whole = host_array(np.zeros((4, 4)), "bf16")
    assert sliced(whole, np.s_[1:]).address == whole.address + 8


# ---- choice ----
def test_choice_says_why() -> None:
    assert choose("numba").why == "asked for by name"
    assert choose().name in ("native", "numba")
    with pytest.raises(ValueError, match="expected auto, native, numba, reference, got 'cuda'"):
        choose("cuda")


def test_a_forced_isa_is_not_called_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    native = pytest.importorskip("hostcompute.backends.native")
    best = native.available_isas()[0]
    monkeypatch.delenv("MONDE_CPU_ISA", raising=False)
    assert choose().why == f"native is the fastest backend; {best} is this CPU's best instruction set"
    assert repr(choose("reference")) == (
        "BackendChoice(name='reference', isa='numpy-float64', why='asked for by name')"
    )
    monkeypatch.setattr(native, "available_isas", lambda: ["avx2", "scalar"])
    monkeypatch.setenv("MONDE_CPU_ISA", "scalar")
    why = "scalar was forced by MONDE_CPU_ISA, this CPU's best instruction set is avx2"
    assert choose().why == f"native is the fastest backend; {why}"
    assert choose("native").why == f"asked for by name; {why}"


def test_an_absent_isa_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONDE_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="sse9"):
        choose()
    with pytest.warns(UserWarning, match="sse9 has no effect"):
        choose("numba")


def test_without_the_native_module_numba_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "hostcompute.backends.native", raising=False)
    monkeypatch.setitem(sys.modules, "hostcompute._native", None)
    monkeypatch.delattr("hostcompute._native", raising=False)
    choice = choose()
    assert choice.name == "numba"
    assert "native backend is not available" in choice.why
    with pytest.raises(RuntimeError, match="pip install"):
        choose("native")
    monkeypatch.setenv("MONDE_CPU_ISA", "avx2")
    with pytest.raises(RuntimeError, match="avx2 needs the native backend"):
        choose()
