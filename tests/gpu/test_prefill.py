"""Long prompts on a real device: any plan gives the same answer, and the CPU waits for counts and activations only."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

import monde
from hostcompute import Activation, ActivationKind, DType, ExpertSpec, make_pool
from monde.device.kernels.panels import MMA
from monde.executors.prefill_size import PrefillSize
from tests.hostcompute.cases import make_batch
from tests.monde import tiny
from tests.monde.prefill_layers import POLICIES, Layers, build, check, check_wide, library_bound, routed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(60, method="thread"),  # a GPU that hangs lets no signal handler run: the process ends
]
pytest.importorskip("hostcompute._native")
pytest.importorskip("cupy", exc_type=ImportError)

GPU = torch.device("cuda", 0)


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three experts of the tests' sizes a buffer, so that several waves take turns."""
    monkeypatch.setattr("monde.executors.prefill_size.BUFFER_BYTES", 40_000)
    monkeypatch.setattr("monde.executors.prefill_size.SCRATCH_BYTES", 60_000)


@pytest.fixture
def pool() -> Any:
    return make_pool(4)


@pytest.fixture
def by_mma(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that every device has."""
    monkeypatch.setattr("monde.device.kernels.prefill.form_of", lambda device: MMA)


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("x_dtype", ["bf16", "f32", "f16"])
@pytest.mark.parametrize("dtype", list(DType))
def test_any_plan_gives_the_same_answer(x_dtype: str, dtype: DType, pool: Any) -> None:
    any_plan(x_dtype, dtype, pool)


@pytest.mark.usefixtures("small_buffers", "by_mma")
def test_any_plan_gives_the_same_answer_on_every_device(pool: Any) -> None:
    any_plan("bf16", DType.BF16, pool)


def any_plan(x_dtype: str, dtype: DType, pool: Any) -> None:
    rng = np.random.default_rng(11)
    shapes = (
        (64, 96, True, False),
        (200, 72, True, True),
        (40, 72, False, True),
        (37, 53, False, True),
    )
    for d_model, d_ffn, gated, bias in shapes:
        spec = ExpertSpec(9, d_model, d_ffn, dtype, gated, has_bias=bias)
        for resident in ([], [7, 0, 3, 4], list(range(9))):
            layers = build([spec], [resident], GPU, pool=pool)
            for num_tokens, top_k in ((1, 1), (17, 5), (130, 3), (700, 4)):
                batch = make_batch(rng, spec, num_tokens, top_k, x_dtype)
                expected = library_bound(spec, layers.experts[0], batch, x_dtype)
                for policy, layers.hub.policy in POLICIES.items():
                    what = f"{spec}, {policy}, {len(resident)} resident, T={num_tokens}, K={top_k}"
                    check(layers, 0, batch, x_dtype, what, expected)
            layers.close()


def test_real_sizes_of_buffers_and_products(pool: Any) -> None:
    real_sizes(pool)


@pytest.mark.usefixtures("by_mma")
def test_real_sizes_of_buffers_and_products_on_every_device(pool: Any) -> None:
    real_sizes(pool)


def real_sizes(pool: Any) -> None:
    """2.4 MB an expert: several to a buffer, several buffers, experts of more rows than a tile."""
    rng = np.random.default_rng(12)
    spec = ExpertSpec(64, 1024, 384)
    layers = build([spec, spec], [[3, 60, 5, 1], []], GPU, pool=pool)
    for num_tokens in (100, 900):
        batches = [make_batch(rng, spec, num_tokens, 8, "bf16") for _ in range(2)]
        batches[0].ids_TK[: num_tokens // 2, 0] = 60
        expected = [library_bound(spec, layers.experts[i], batches[i], "bf16") for i in range(2)]
        for policy, layers.hub.policy in POLICIES.items():
            for i in (0, 1, 0, 1):  # from the second round on with what was fetched ahead
                what = f"{policy}, layer {i}, T={num_tokens}"
                check(layers, i, batches[i], "bf16", what, expected[i])
    layers.close()


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("x_dtype", ["bf16", "f32"])
def test_experts_larger_than_a_buffer_come_in_pieces(policy: str, x_dtype: str, pool: Any) -> None:
    rng = np.random.default_rng(5)
    for gated, bias in ((True, False), (False, True)):
        spec = ExpertSpec(4, 72, 330, DType.BF16, gated, has_bias=bias)
        layers = build([spec], [[2]], GPU, POLICIES[policy], pool=pool)
        assert layers.executors[0].size.piece_rows < 330
        for _ in range(3):
            check(layers, 0, make_batch(rng, spec, 100, 2, x_dtype), x_dtype, f"{policy}, gated={gated}")
        layers.close()


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("x_dtype", ["bf16", "f16"])
def test_sums_can_stay_in_fp32(policy: str, x_dtype: str, pool: Any) -> None:
    rng = np.random.default_rng(13)
    for dtype in (DType.BF16, DType.F32):
        spec = ExpertSpec(9, 64, 96, dtype, has_bias=True)
        layers = build([spec], [[7, 0]], GPU, POLICIES[policy], pool=pool)
        check_wide(layers, make_batch(rng, spec, 130, 3, x_dtype), x_dtype, f"{policy}, {spec}")
        layers.close()


@pytest.mark.parametrize("kind", list(ActivationKind))
def test_every_activation(kind: ActivationKind, pool: Any) -> None:
    rng = np.random.default_rng(3)
    for gated in (True, False):
        if kind.needs_gate and not gated:
            continue
        activation = Activation(kind, limit=2.0 if kind.needs_gate else float("inf"))
        spec = ExpertSpec(6, 96, 64, DType.BF16, gated, activation)
        layers = build([spec], [[1, 2]], GPU, POLICIES["cut"], pool=pool)
        check(layers, 0, make_batch(rng, spec, 90, 3, "bf16"), "bf16", f"{kind.value} gated={gated}")
        layers.close()


@pytest.mark.parametrize("policy", list(POLICIES))
def test_long_prompts_are_taken_in_chunks(policy: str, pool: Any) -> None:
    rng = np.random.default_rng(6)
    spec = ExpertSpec(16, 256, 96)
    layers = build([spec], [[1]], GPU, POLICIES[policy], num_tokens=300, pool=pool)
    check(layers, 0, make_batch(rng, spec, 1000, 3, "bf16"), "bf16", policy)
    layers.close()


@pytest.mark.parametrize("policy", list(POLICIES))
def test_the_cpu_waits_for_nothing_but_counts_and_activations(
    policy: str, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch refuses every operation that synchronises; the two events waited for are counted."""
    rng = np.random.default_rng(7)
    spec = ExpertSpec(32, 512, 384)
    layers = build([spec, spec], [[3, 4], [0]], GPU, POLICIES[policy], pool=pool)
    batches = [routed(make_batch(rng, spec, 600, 4, "bf16"), GPU) for _ in range(4)]
    for batch in batches:  # kernels are compiled, buffers grown
        for executor in layers.executors:
            executor.forward(batch)
    torch.cuda.synchronize()
    waits: list[str] = []
    from monde.device.lanes import _CudaMark

    original = _CudaMark.wait

    def counted(mark: _CudaMark) -> None:
        waits.append("wait")
        original(mark)

    monkeypatch.setattr(_CudaMark, "wait", counted)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            for executor in layers.executors:
                executor.forward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 2 * len(batches) * len(layers.executors)
    assert len(waits) >= len(batches) * len(layers.executors)
    layers.close()


def test_two_models_and_two_streams(pool: Any) -> None:
    """Calls alternate between streams without anybody waiting in between; results are read at the end."""
    rng = np.random.default_rng(8)
    spec = ExpertSpec(32, 512, 384)
    models = [build([spec], [[i, 7]], GPU, POLICIES["cut"], seed=i, pool=pool) for i in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[tuple[Layers, Any, torch.Tensor]] = []
    batches = [make_batch(rng, spec, 300, 4, "bf16") for _ in range(6)]
    on_gpu = [routed(batch, GPU) for batch in batches]
    torch.cuda.synchronize()
    for round_idx, (batch, there) in enumerate(zip(batches, on_gpu, strict=True)):
        for model_idx, layers in enumerate(models):
            with torch.cuda.stream(streams[(round_idx + model_idx) % 2]):
                results.append((layers, batch, layers.executors[0].forward(there)))
    torch.cuda.synchronize()
    from tests.hostcompute.bounds import assert_within

    for i, (layers, batch, y_TD) in enumerate(results):
        bound = library_bound(spec, layers.experts[0], batch, "bf16")
        assert_within(y_TD.float().cpu().numpy(), bound, f"call {i}")
    for layers in models:
        layers.close()


class Late:
    """A forward that another thread finishes later."""

    def __init__(self, pending: Any, seconds_s: float) -> None:
        self._pending, self._done = pending, threading.Event()
        threading.Timer(seconds_s, self._done.set).start()
        self.busy_s, self.counts = seconds_s, None

    def done(self) -> bool:
        return self._done.is_set()

    def wait_for(self, seconds_s: float) -> bool:
        return self._done.wait(seconds_s)

    def wait(self) -> Any:
        y_TD = self._pending.wait()
        self.counts = self._pending.counts
        return y_TD


def delayed(layers: Layers, layer_idx: int, seconds_s: float) -> Any:
    """The layer's bank, answering late; gives back how to undo it."""
    bank = layers.executors[layer_idx].bank
    submit = bank.submit
    bank.submit = lambda *a, **k: Late(submit(*a, **k), seconds_s)  # type: ignore[method-assign,assignment,return-value]
    return lambda: setattr(bank, "submit", submit)


def test_a_late_host_is_an_error_with_the_layer_and_the_next_call_works(pool: Any) -> None:
    rng = np.random.default_rng(9)
    spec = ExpertSpec(8, 128, 64)
    layers = build([spec, spec], [[0], [1]], GPU, POLICIES["cut"], deadline_s=0.2, pool=pool)
    batch = make_batch(rng, spec, 100, 3, "bf16")
    check(layers, 1, batch, "bf16", "before")  # kernels are compiled
    undo = delayed(layers, 1, 1.0)
    start_s = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"MoE layer 1: the host did not answer within 0\.2 s; call again"):
        layers.executors[1].forward(routed(batch, GPU))
    torch.cuda.synchronize()
    assert time.perf_counter() - start_s < 0.9
    undo()
    for layer_idx in (0, 1):
        check(layers, layer_idx, batch, "bf16", "after the failure")
    layers.close()


def test_the_device_works_while_the_host_is_waited_for(pool: Any) -> None:
    """Everything but the sum is launched, and has run, before a host that takes 0.3 s answers."""
    rng = np.random.default_rng(10)
    spec = ExpertSpec(32, 512, 384)
    layers = build([spec], [[0]], GPU, POLICIES["mixed"], pool=pool)
    batch = make_batch(rng, spec, 500, 4, "bf16")
    check(layers, 0, batch, "bf16", "warm")
    there = routed(batch, GPU)
    undo = delayed(layers, 0, 0.3)
    wait, seen = layers.hub.host.wait, []

    def watched(*args: Any) -> Any:
        event = torch.cuda.Event()
        event.record()
        time.sleep(0.15)
        seen.append(event.query())
        return wait(*args)

    layers.hub.host.wait = watched  # type: ignore[method-assign]
    layers.executors[0].forward(there)
    undo()
    assert seen == [True]
    layers.close()


def test_a_missing_expert_names_the_layer_and_the_next_call_works(pool: Any) -> None:
    rng = np.random.default_rng(13)
    spec = ExpertSpec(6, 64, 96)
    layers = build([spec, spec], [[0], [1]], GPU, POLICIES["host"], pool=pool)
    batch = make_batch(rng, spec, 100, 3, "bf16")
    executor, expert = layers.executors[1], layers.experts[1][4]
    executor.bank.release(4)
    with pytest.raises(RuntimeError, match=r"MoE layer 1: .*expert 4 was never loaded"):
        executor.forward(routed(batch, GPU))
    executor.bank.load(4, **expert)
    check(layers, 1, batch, "bf16", "after the failure")
    layers.close()


def test_memory_stays_within_the_plan(pool: Any) -> None:
    rng = np.random.default_rng(14)
    spec = ExpertSpec(64, 1024, 384)
    num_tokens = 2048
    size = PrefillSize.of([spec], 2, num_tokens, 8)
    batch = routed(make_batch(rng, spec, num_tokens, 8, "bf16"), GPU)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before_bytes = torch.cuda.memory_allocated()
    layers = build([spec], [list(range(16))], GPU, num_tokens=num_tokens, pool=pool)
    slots = layers.executors[0].slots
    assert slots is not None
    for policy, layers.hub.policy in POLICIES.items():
        torch.cuda.reset_peak_memory_stats()
        y_TD = layers.executors[0].forward(batch)
        torch.cuda.synchronize()
        used_bytes = torch.cuda.max_memory_allocated() - before_bytes - slots.num_bytes
        # Libraries take workspace of their own from torch, which the plan counts elsewhere.
        allowed_bytes = size.fixed_bytes + size.workspace_bytes + y_TD.nbytes + (64 << 20)
        assert used_bytes <= allowed_bytes, (policy, used_bytes, size)
    layers.close()


@pytest.mark.parametrize(
    ("name", "share"), [*((name, 0.5) for name in tiny.NAMES), (tiny.NAMES[0], 0), (tiny.NAMES[0], 1)]
)
def test_whole_models(name: str, share: float) -> None:
    """A prompt of 150 tokens through every family's tiny model, half of them resident; and none, and all."""
    original = tiny.build(name)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 75), generator=torch.Generator().manual_seed(2))
    plan = monde.offload(copy.deepcopy(original), max_context=150, max_batch=2).monde.plan
    budget_bytes = plan.gpu_used_bytes - plan.slots_bytes + int(share * plan.size.all_slots_bytes)
    model = monde.offload(copy.deepcopy(original), max_context=150, max_batch=2, gpu_memory=budget_bytes)
    with torch.no_grad():
        for _ in range(2):
            tiny.assert_logits(model(ids.cuda()).logits.cpu(), tiny.expected(original, ids))
    counters = model.monde.counters()
    assert (counters.num_resident_pairs == counters.num_pairs) == (share == 1)
    model.monde.close()


@pytest.mark.parametrize("num_experts", [1, 9, 128, 1000])
def test_layers_that_need_no_plan_are_laid_out_as_planned(num_experts: int) -> None:
    """Begins and tiles are those that Python makes of the same counts, and the pairs are counted."""
    from monde.device.kernels.prefill import PrefillKernels
    from monde.executors.pieces import PackedAt
    from monde.executors.waves import Order, Wave, tiles_of

    rng = np.random.default_rng(num_experts)
    kernels = PrefillKernels(
        torch.bfloat16, torch.bfloat16, GPU, lambda array: torch.from_numpy(array).cuda()
    )
    slot_E, pairs = rng.permutation(num_experts), torch.zeros(1, dtype=torch.int64, device=GPU)
    slots = torch.from_numpy(np.append(slot_E, -1)).int().cuda()
    num_pairs = 0
    for most in (0, 3, 200, 700):
        counts_E = rng.integers(0, most + 1, num_experts) * (rng.random(num_experts) < 0.7)
        begin_E, tiles_4 = kernels.lay_out(
            torch.from_numpy(counts_E).cuda(), slots, 4096, pairs, int(counts_E.sum()) + 17
        )
        order = Order.of(np.arange(num_experts), counts_E)
        wave = Wave.of(
            np.arange(num_experts),
            (0, 96),
            PackedAt(0, 0, 0),
            slot_E.astype(np.int64) * 4096,
            slot_E.astype(np.int64),
            order,
        )
        want, (num_tiles,) = tiles_of([wave], kernels.tile_rows)
        assert begin_E.tolist() == order.begin_E.tolist()
        assert tiles_4[:num_tiles].tolist() == want.tolist()
        assert (tiles_4[num_tiles:, 2] == 0).all()
        num_pairs += int(counts_E.sum())
        assert pairs.item() == num_pairs


def test_layers_that_need_no_plan_do_not_hold_python_up(pool: Any) -> None:
    """Python launches one after the other while the device is busy; pairs are counted all the same."""
    spec = ExpertSpec(16, 64, 96)
    layers = build([spec] * 2, [list(range(16))] * 2, GPU, pool=pool)
    batch = routed(make_batch(np.random.default_rng(3), spec, 300, 4, "bf16"), GPU)
    executor = layers.executors[0]
    is_known = (batch.topk_ids_TK >= 0) & (batch.topk_ids_TK < spec.num_experts)
    num_pairs = int((is_known & (batch.topk_weights_TK != 0)).sum())
    want = executor.forward(batch)
    executor.hub.reads_counts = True
    planned = executor.forward(batch)
    executor.hub.reads_counts = False
    assert torch.equal(want, planned), "rows of a tile are computed alike"
    executor.reset_totals()
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(int(2e9))  # about a second
    busy.record()
    start_s = time.perf_counter()
    y_TD = executor.forward(batch)
    assert not busy.query(), "it waited for the device"
    assert time.perf_counter() - start_s < 0.5
    assert torch.equal(y_TD, want)
    assert executor.num_resident_pairs == num_pairs
    layers.close()
