"""Long prompts, the CPU standing in for the GPU: any plan gives the same answer, and nothing is left lying about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hostcompute import Activation, ActivationKind, DType, ExpertSpec
from monde.planning.split import Where
from tests.hostcompute.cases import make_batch
from tests.monde.prefill_layers import POLICIES, build, check, check_wide, routed

pytest.importorskip("hostcompute._native")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three experts of the tests' sizes a buffer, so that several waves take turns."""
    monkeypatch.setattr("monde.executors.prefill_size.BUFFER_BYTES", 40_000)
    monkeypatch.setattr("monde.executors.prefill_size.SCRATCH_BYTES", 60_000)


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("x_dtype", ["bf16", "f32", "f16"])
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("resident", ["none", "some", "all"])
def test_any_plan_gives_the_same_answer(policy: str, x_dtype: str, dtype: DType, resident: str) -> None:
    rng = np.random.default_rng(11)
    for d_model, d_ffn, gated, bias in ((64, 96, True, False), (200, 72, True, True), (37, 53, False, True)):
        spec = ExpertSpec(9, d_model, d_ffn, dtype, gated, has_bias=bias)
        chosen = {"none": [], "some": [7, 0, 3, 4], "all": list(range(9))}[resident]
        layers = build([spec], [chosen], CPU, POLICIES[policy])
        for num_tokens, top_k in ((1, 1), (17, 5), (130, 3)):
            batch = make_batch(rng, spec, num_tokens, top_k, x_dtype)
            check(layers, 0, batch, x_dtype, f"{spec}, {policy}, {resident}, T={num_tokens}, K={top_k}")
        layers.close()


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("x_dtype", ["bf16", "f16"])
def test_sums_can_stay_in_fp32(policy: str, x_dtype: str) -> None:
    rng = np.random.default_rng(13)
    for dtype in (DType.BF16, DType.F32):
        spec = ExpertSpec(9, 64, 96, dtype, has_bias=True)
        layers = build([spec], [[7, 0]], CPU, POLICIES[policy])
        check_wide(layers, make_batch(rng, spec, 130, 3, x_dtype), x_dtype, f"{policy}, {spec}")
        layers.close()


@pytest.mark.parametrize("kind", list(ActivationKind))
def test_every_activation(kind: ActivationKind) -> None:
    rng = np.random.default_rng(3)
    for gated in (True, False):
        if kind.needs_gate and not gated:
            continue
        activation = Activation(kind, limit=2.0 if kind.needs_gate else float("inf"))
        spec = ExpertSpec(6, 96, 64, DType.BF16, gated, activation)
        layers = build([spec], [[1, 2]], CPU, POLICIES["cut"])
        check(layers, 0, make_batch(rng, spec, 90, 3, "bf16"), "bf16", f"{kind.value} gated={gated}")
        layers.close()


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("x_dtype", ["bf16", "f32"])
def test_experts_larger_than_a_buffer_come_in_pieces(policy: str, x_dtype: str) -> None:
    rng = np.random.default_rng(5)
    for gated, bias in ((True, False), (False, True)):
        spec = ExpertSpec(4, 72, 330, DType.BF16, gated, has_bias=bias)
        layers = build([spec], [[2]], CPU, POLICIES[policy])
        executor = layers.executors[0]
        assert 32 <= executor.size.piece_rows < 330
        assert executor.size.piece_bytes <= 40_960
        check(layers, 0, make_batch(rng, spec, 100, 2, x_dtype), x_dtype, f"{policy}, gated={gated}")
        layers.close()


@pytest.mark.parametrize("policy", list(POLICIES))
def test_long_prompts_are_taken_in_chunks(policy: str) -> None:
    rng = np.random.default_rng(6)
    spec = ExpertSpec(8, 64, 96)
    layers = build([spec], [[1]], CPU, POLICIES[policy], num_tokens=50)
    assert layers.hub.size.chunk_tokens(3) == 50
    check(layers, 0, make_batch(rng, spec, 170, 3, "bf16"), "bf16", policy)
    layers.close()


def test_many_rows_of_one_expert_go_block_by_block() -> None:
    rng = np.random.default_rng(7)
    spec = ExpertSpec(4, 64, 96)
    layers = build([spec], [[0, 1]], CPU, POLICIES["fetch"])
    layers.hub.block_rows = 32
    batch = make_batch(rng, spec, 200, 2, "bf16")
    batch.ids_TK[:150] = 1
    check(layers, 0, batch, "bf16", "blocks")
    layers.close()


def test_the_plan_is_what_happens_and_is_counted() -> None:
    rng = np.random.default_rng(8)
    spec = ExpertSpec(10, 64, 96)
    layers = build([spec], [[0, 9]], CPU, POLICIES["cut"])
    executor, batch = layers.executors[0], make_batch(rng, spec, 200, 4, "bf16")
    executor.forward(routed(batch, CPU))
    assert executor.latest is not None
    split, ids = executor.latest.split, batch.ids_TK
    wanted = (ids >= 0) & (ids < 10) & (batch.weights_TK.float32() != 0)
    pairs_E = np.bincount(ids[wanted], minlength=10)
    assert split.cut_expert is not None
    assert (split.where_E[[0, 9]] == Where.RESIDENT).all()
    assert executor.num_resident_pairs == pairs_E[[0, 9]].sum()
    assert executor.num_fetched_pairs == pairs_E[split.where_E == Where.FETCHED].sum()
    assert executor.totals.num_pairs == pairs_E[split.where_E == Where.HOST].sum()
    assert executor.totals.h2d_bytes > 4 * 3 * 64 * 96 * 2


def test_the_host_begins_before_there_is_a_plan() -> None:
    """From the second layer with as many tokens on, with some of what the plan gives it."""
    rng = np.random.default_rng(2)
    spec = ExpertSpec(16, 64, 96, DType.BF16)
    layers = build([spec] * 3, [[0, 5], [], [3]], CPU)
    layers.hub.begins = True
    for num_tokens in (130, 70):
        for layer_idx in range(3):
            check(
                layers, layer_idx, make_batch(rng, spec, num_tokens, 4, "bf16"), "bf16", f"layer {layer_idx}"
            )
            plan = layers.executors[layer_idx].latest
            assert plan is not None
            if layer_idx == 0:
                assert plan.load.begun_E is None
                continue
            assert plan.load.begun_E is not None
            assert plan.load.begun_E.any()
            assert (plan.split.where_E[plan.load.begun_E] == Where.HOST).all()
            waits_E = (plan.split.where_E == Where.HOST) & ~plan.load.begun_E
            assert waits_E.any()
            assert plan.load.tokens_E[plan.load.begun_E].max() <= plan.load.tokens_E[waits_E].max()
    layers.close()


def test_the_next_layers_experts_are_fetched_ahead() -> None:
    """Layer by layer they are used, where the same layer comes next; elsewhere they are dropped, not mixed up."""
    rng = np.random.default_rng(9)
    spec = ExpertSpec(8, 64, 96)
    layers = build([spec, spec, spec], [[], [3], []], CPU, POLICIES["fetch"])
    ahead: list[list[int]] = []
    take = layers.hub.take_prefetched

    def watched(layer: Any) -> Any:
        shipments = take(layer)
        ahead.append([p.expert_id for s in shipments for p in s.pieces])
        return shipments

    layers.hub.take_prefetched = watched  # type: ignore[method-assign]
    for layer_idx in (0, 1, 2, 0, 2, 1, 1, 0, 1, 2):
        check(layers, layer_idx, make_batch(rng, spec, 100, 3, "bf16"), "bf16", f"layer {layer_idx}, {ahead}")
    assert [bool(experts) for experts in ahead] == [
        False,
        True,
        True,
        False,
        False,
        False,
        False,
        False,
        True,
        True,
    ]
    assert all(3 not in experts for experts in ahead[1:2])
    layers.close()


def test_one_expert_may_get_everything_and_others_nothing() -> None:
    rng = np.random.default_rng(10)
    spec = ExpertSpec(8, 64, 96)
    for policy in POLICIES.values():
        layers = build([spec, spec], [[2], [5]], CPU, policy)
        for expert_id in (0, 2, 7, 99):
            for layer_idx in (0, 1):
                batch = make_batch(rng, spec, 100, 2, "bf16")
                batch.ids_TK[...] = expert_id
                check(layers, layer_idx, batch, "bf16", f"only {expert_id}")
        layers.close()


def test_no_tokens_are_no_work() -> None:
    layers = build([ExpertSpec(4, 32, 64)], [[0]], CPU)
    batch = make_batch(np.random.default_rng(0), layers.specs[0], 0, 2, "bf16")
    assert layers.executors[0].forward(routed(batch, CPU)).shape == (0, 32)


class Stuck:
    """A host that takes its time."""

    def wait_for(self, seconds_s: float) -> bool:
        return False

    def done(self) -> bool:
        return False


@pytest.mark.parametrize("policy", ["cut", "best"])  # best: the host has begun before the plan
def test_a_late_host_is_an_error_with_the_layer_and_the_next_call_works(policy: str) -> None:
    rng = np.random.default_rng(12)
    spec = ExpertSpec(12, 64, 96)
    layers = build([spec, spec], [[0], [1]], CPU, POLICIES[policy], deadline_s=0.1)
    layers.hub.begins = True
    batch = make_batch(rng, spec, 100, 3, "bf16")
    executor = layers.executors[1]
    for layer_idx in (0, 1):
        check(layers, layer_idx, batch, "bf16", "before")
    submit = executor.bank.submit
    executor.bank.submit = lambda *args, **kwargs: Stuck()  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(RuntimeError, match=r"MoE layer 1: the host did not answer within 0\.1 s; call again"):
        executor.forward(routed(batch, CPU))
    executor.bank.submit = submit  # type: ignore[method-assign]
    assert executor.latest is not None
    assert (executor.latest.load.begun_E is not None) == (policy == "best")
    for layer_idx in (0, 1):
        check(layers, layer_idx, batch, "bf16", "after the failure")
    layers.close()


@pytest.mark.parametrize("policy", ["host", "best"])
def test_a_missing_expert_names_the_layer_and_the_next_call_works(policy: str) -> None:
    rng = np.random.default_rng(13)
    spec = ExpertSpec(12, 64, 96)
    layers = build([spec, spec], [[0], [1]], CPU, POLICIES[policy])
    layers.hub.begins = True
    batch = make_batch(rng, spec, 100, 3, "bf16")
    executor = layers.executors[1]
    check(layers, 1, batch, "bf16", "before")
    assert executor.latest is not None
    lightest = int(np.flatnonzero(executor.latest.split.where_E == Where.HOST)[0])
    executor.bank.release(lightest)
    with pytest.raises(RuntimeError, match=rf"MoE layer 1: .*expert {lightest} was never loaded"):
        executor.forward(routed(batch, CPU))
    executor.bank.load(lightest, **layers.experts[1][lightest])
    check(layers, 1, batch, "bf16", "after the failure")
    layers.close()


def test_what_fails_while_the_host_computes_leaves_it_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two submits of one batch: the next batch is written elsewhere."""
    rng = np.random.default_rng(16)
    spec = ExpertSpec(12, 64, 96)
    layers = build([spec, spec], [[0], [1]], CPU)
    layers.hub.begins = True
    batches = [make_batch(rng, spec, 100, 3, "bf16") for _ in range(2)]
    check(layers, 0, batches[0], "bf16", "before")
    staging = layers.hub.host._staging
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(layers.executors[1].device, "place", full)
        with pytest.raises(torch.OutOfMemoryError):
            layers.executors[1].forward(routed(batches[0], CPU))
        assert layers.hub.host._staging is not staging
        assert layers.hub.host._late[0][1] is staging
    for layer_idx in (0, 1):
        check(layers, layer_idx, batches[1], "bf16", "after the failure")
    layers.close()


def test_any_mode_of_autograd_may_come_first() -> None:
    rng = np.random.default_rng(14)
    spec = ExpertSpec(6, 64, 96)
    layers = build([spec], [[0]], CPU, POLICIES["cut"])
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            check(layers, 0, make_batch(rng, spec, 80, 2, "bf16"), "bf16", mode.__name__)
    layers.close()


@pytest.mark.parametrize("policy", list(POLICIES))
def test_grouped_products(policy: str) -> None:
    """What a GPU with CUTLASS' grouped product does; torch's CPU twin of it takes the same arguments."""
    rng = np.random.default_rng(15)
    spec = ExpertSpec(12, 64, 96)
    layers = build([spec], [[0, 5, 11]], CPU, POLICIES[policy])
    layers.hub.block_rows = 40
    layers.executors[0].device.products(torch.bfloat16)._has_grouped = True
    for num_tokens, top_k in ((1, 2), (150, 3)):
        check(
            layers, 0, make_batch(rng, spec, num_tokens, top_k, "bf16"), "bf16", f"{policy}, T={num_tokens}"
        )
    layers.close()
