"""Expert deferral on GPU and host at once, against the float64 oracle and the CPU's twin. Letters as in monde.core."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import monde
from hostcompute import DType, ExpertSpec
from monde.models.decode_runner import CAPTURE_AFTER_STEPS
from monde.routing.deferral import deferred_pairs_TK
from tests.gpu.test_decode_executor import Layers, Silent, bf16_dots, build, on_gpu, torch_array
from tests.hostcompute.bounds import HALF_SUBNORMAL, UNIT, Expected, assert_within
from tests.hostcompute.cases import Batch, expected, make_batch
from tests.monde import tiny
from tests.monde.deferred_reference import DeferredReference
from tests.monde.test_deferral import PROMPT, STEPS, decode
from tests.monde.test_deferral import expected as expected_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("hostcompute._native")
pytest.importorskip("cupy")

NOBODY: list[int] = []
PLACES = {
    "host": [NOBODY, NOBODY, NOBODY, NOBODY],
    "some": [[7, 0, 3, 4], [1, 2], [8, 6, 5, 4, 3], [0]],
    "gpu": [list(range(9))] * 4,
    "by turns": [NOBODY, list(range(9)), [2, 3], list(range(9))],  # who is all on the GPU never rings
}


# ---- layers ----
def step(layers: Layers, batches: Sequence[Any], num_left: int) -> list[Tensor]:
    """y_TD of every layer; batches are the oracle's, or on the GPU already."""
    left, outputs = None, []
    for layer_idx, (executor, batch) in enumerate(zip(layers.executors, batches, strict=True)):
        is_last = layer_idx == len(layers.executors) - 1
        routed = on_gpu(batch) if isinstance(batch, Batch) else batch
        done = executor.forward_deferring(routed, 0 if is_last else num_left, left)
        left = done.left
        outputs.append(done.y_TD)
    return outputs


def wanted(layers: Layers, batches: Sequence[Batch], num_left: int, x_dtype: str) -> list[Expected]:
    """What counts now of every layer and later of the one before, and the bound on the rounded sum of both."""
    later: Expected | None = None
    wants = []
    for layer_idx, batch in enumerate(batches):
        spec, experts = layers.specs[layer_idx], layers.experts[layer_idx]
        num = 0 if layer_idx == len(batches) - 1 else num_left
        is_later_TK = deferred_pairs_TK(torch_array(batch.weights_TK), num).numpy()

        def part(mine_TK: Any, batch: Batch = batch, spec: Any = spec, experts: Any = experts) -> Expected:
            mine = dataclasses.replace(batch, ids_TK=np.where(mine_TK, batch.ids_TK, -1))
            return expected(spec, experts, mine, "f32", bf16_dots(spec, x_dtype))

        now = part(~is_later_TK)
        value_TD, error_TD = now.value, now.error
        if later is not None:
            value_TD, error_TD = value_TD + later.value, error_TD + later.error
        error_TD = (
            error_TD + UNIT[x_dtype] * (np.abs(value_TD) + error_TD) + UNIT["f32"] * np.abs(value_TD) * 2
        )
        wants.append(Expected(value_TD, error_TD + HALF_SUBNORMAL[x_dtype]))
        later = part(is_later_TK) if num else None
    return wants


def check(layers: Layers, batches: Sequence[Batch], num_left: int, x_dtype: str, what: str) -> None:
    outputs = step(layers, batches, num_left)
    compare(outputs, wanted(layers, batches, num_left, x_dtype), what)
    layers.hub.check()


def compare(outputs: Sequence[Tensor], wants: Sequence[Expected], what: str) -> None:
    for layer_idx, (y_TD, want) in enumerate(zip(outputs, wants, strict=True)):
        assert_within(y_TD.float().cpu().numpy(), want, f"{what}, layer {layer_idx}")


def batches_of(rng: Any, layers: Layers, num_tokens: int, top_k: int, x_dtype: str = "bf16") -> list[Batch]:
    return [make_batch(rng, spec, num_tokens, top_k, x_dtype) for spec in layers.specs]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("x_dtype", "dtype", "share"),
    [
        ("bf16", DType.BF16, None),
        ("bf16", DType.BF16, 0.5),
        ("f32", DType.F32, None),
        ("f16", DType.BF16, None),
        ("f32", DType.BF16, None),
    ],
)
def test_any_placement(place: str, x_dtype: str, dtype: DType, share: float | None) -> None:
    rng = np.random.default_rng(21)
    for d_model, d_ffn in ((64, 96), (200, 264)):
        layers = build([ExpertSpec(9, d_model, d_ffn, dtype)] * 4, PLACES[place], x_dtype, 1, share=share)
        for num_tokens, top_k, num_left in (
            (1, 2, 1),
            (1, 8, 3),
            (3, 8, 7),
            (17, 5, 2),
            (64, 3, 1),
            (1, 4, 0),
        ):
            for again in range(3):
                batches = batches_of(rng, layers, num_tokens, top_k, x_dtype)
                what = f"{place}, D={d_model}, T={num_tokens}, K={top_k}, N={num_left}, step {again}"
                check(layers, batches, num_left, x_dtype, what)
        layers.hub.close()


def test_of_equal_weights_the_later_in_k_are_left() -> None:
    rng = np.random.default_rng(22)
    layers = build([ExpertSpec(9, 64, 32)] * 2, [[0, 4], [1]], "bf16", 1)
    for _ in range(5):
        batches = batches_of(rng, layers, 4, 6)
        for batch in batches:
            batch.weights_TK.numpy()[...] = rng.choice([0.25, 0.5], batch.ids_TK.shape)
        check(layers, batches, 3, "bf16", "equal weights")
    layers.hub.close()


def test_a_layer_of_residents_waits_for_all_that_a_slow_host_owes() -> None:
    """Not for the answer to what counted a layer before alone."""
    rng = np.random.default_rng(30)
    specs = [ExpertSpec(9, 256, 4096), ExpertSpec(9, 256, 32)]
    layers = build(specs, [NOBODY, list(range(9))], "bf16", 3)
    for again in range(5):
        check(layers, batches_of(rng, layers, 4, 8), 6, "bf16", f"step {again}")
    layers.hub.close()


def test_counters_add_up() -> None:
    rng = np.random.default_rng(23)
    layers = build([ExpertSpec(9, 64, 32)] * 4, PLACES["some"], "bf16", 2)
    num_pairs = num_resident = 0
    for _ in range(10):
        batches = batches_of(rng, layers, 3, 4)
        check(layers, batches, 2, "bf16", "counted")
        for batch, table in zip(batches, layers.tables, strict=True):
            ids = batch.ids_TK
            ids = ids[(ids >= 0) & (ids < 9) & (batch.weights_TK.float32() != 0)]
            num_pairs += ids.size
            num_resident += int((np.array(table)[ids] >= 0).sum())
    torch.cuda.synchronize()
    time.sleep(0.01)
    totals = layers.hub.doorbell.totals
    assert totals.num_pairs == layers.hub.count("COLD_PAIRS") == num_pairs - num_resident
    assert layers.hub.count("RESIDENT_PAIRS") == num_resident
    assert totals.num_rings == 40
    assert 0 < totals.later_s < totals.busy_s
    layers.hub.close()


def test_nothing_is_new_where_nothing_is_deferred() -> None:
    rng = np.random.default_rng(24)
    layers = build([ExpertSpec(9, 64, 32)] * 4, PLACES["some"], "bf16", 2)
    for _ in range(4):
        batches = batches_of(rng, layers, 3, 4)
        plain = [e.forward(on_gpu(b)) for e, b in zip(layers.executors, batches, strict=True)]
        assert all(map(torch.equal, plain, step(layers, batches, 0)))
    assert layers.hub.count("LEFT_RING") == layers.hub.count("EARLIER_RING") == 0
    assert layers.hub.doorbell.totals.later_s == 0
    layers.hub.close()


# ---- graphs, and others in between ----
def captured(layers: Layers, batches: Sequence[Any], num_left: int) -> tuple[Any, list[Tensor]]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(layers, batches, num_left)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outputs = step(layers, batches, num_left)
    return graph, outputs


def fill(there: Any, batch: Batch) -> None:
    fresh = on_gpu(batch)
    for name in ("x_TD", "topk_ids_TK", "topk_weights_TK"):
        getattr(there, name).copy_(getattr(fresh, name))


@pytest.mark.parametrize("place", PLACES)
def test_a_graph_replays(place: str) -> None:
    """Between replays, now and then, an eager step and one that is cut short."""
    rng = np.random.default_rng(25)
    layers = build([ExpertSpec(9, 128, 64)] * 4, PLACES[place], "bf16", 4)
    inputs = [on_gpu(batch) for batch in batches_of(rng, layers, 4, 4)]
    graph, outputs = captured(layers, inputs, 2)
    for replay in range(60):
        batches = batches_of(rng, layers, 4, 4)
        for there, batch in zip(inputs, batches, strict=True):
            fill(there, batch)
        if replay % 3 == 1:
            check(layers, batches_of(rng, layers, 2, 3), 1, "bf16", f"eager before replay {replay}")
        if replay % 3 == 2:
            layers.executors[0].forward_deferring(on_gpu(batches[1]), 3, None)
        layers.hub.before_replay()
        graph.replay()
        torch.cuda.synchronize()
        layers.hub.check()
        compare(outputs, wanted(layers, batches, 2, "bf16"), f"replay {replay}")
        eager = step(layers, batches, 2)
        assert all(map(torch.equal, eager, outputs)), f"replay {replay}"
    layers.hub.close()


@pytest.mark.parametrize("place", PLACES)
def test_another_call_between_two_layers(place: str) -> None:
    """As where threads take turns by layer: a prompt, another step, a replay. What was left is not lost."""
    rng = np.random.default_rng(26)
    layers = build([ExpertSpec(9, 64, 32)] * 4, PLACES[place], "bf16", 5)
    prompt = batches_of(rng, layers, 17, 3)
    graph, _ = captured(layers, [on_gpu(batch) for batch in prompt], 1)
    for round_idx in range(12):
        batches, left, outputs = batches_of(rng, layers, 3, 4), None, []
        for layer_idx, (executor, batch) in enumerate(zip(layers.executors, batches, strict=True)):
            done = executor.forward_deferring(on_gpu(batch), 2 if layer_idx < 3 else 0, left)
            left = done.left
            outputs.append(done.y_TD)
            if round_idx % 3 == 0:
                layers.executors[layer_idx].forward(on_gpu(prompt[layer_idx]))
            elif round_idx % 3 == 1:
                check(layers, batches_of(rng, layers, 64, 2), 1, "bf16", "the step between")
            else:
                layers.hub.before_replay()
                graph.replay()
        compare(outputs, wanted(layers, batches, 2, "bf16"), f"round {round_idx}")
        layers.hub.check()
    layers.hub.close()


def test_a_step_cut_short_leaves_nothing() -> None:
    rng = np.random.default_rng(27)
    layers = build([ExpertSpec(9, 64, 32)] * 4, PLACES["some"], "bf16", 6)
    for round_idx in range(30):
        left = None
        for executor in layers.executors[: 1 + round_idx % 3]:
            left = executor.forward_deferring(
                on_gpu(make_batch(rng, executor.spec, 64, 4, "bf16")), 3, left
            ).left
        del left
        check(layers, batches_of(rng, layers, 1 + round_idx % 5, 4), 2, "bf16", f"round {round_idx}")
    layers.hub.close()


# ---- failures ----
def batch_for(rng: Any, spec: ExpertSpec, heavy: int, light: int) -> Batch:
    batch = make_batch(rng, spec, 2, 2, "bf16")
    batch.ids_TK[...] = [heavy, light]
    batch.weights_TK.numpy()[...] = [1, 0.25]
    return batch


def test_a_missing_expert_that_counts_later() -> None:
    rng, spec = np.random.default_rng(28), ExpertSpec(9, 64, 32)
    layers = build([spec] * 4, PLACES["host"], "bf16", 7)
    released = layers.experts[1][5]
    layers.hub.banks[1].release(5)  # behind the table's back
    batches = [batch_for(rng, spec, 0, 5) for _ in range(4)]
    outputs = step(layers, batches, 1)
    torch.cuda.synchronize()
    assert not torch.isnan(outputs[0]).any()
    assert torch.isnan(outputs[2]).all()
    assert torch.isnan(outputs[3]).all()
    with pytest.raises(RuntimeError, match="layer 1: expert 5 is not in host memory"):
        layers.hub.check()
    layers.hub.banks[1].load(5, **released)
    for again in range(3):
        check(layers, batches, 1, "bf16", f"after the failure, {again}")
    layers.hub.close()


def test_a_layer_does_not_wait_for_what_it_leaves_and_the_next_one_no_longer_than_the_deadline() -> None:
    from hostcompute.doorbell import Doorbell, MailboxAddresses

    rng, spec = np.random.default_rng(29), ExpertSpec(9, 64, 32)
    layers = build([spec] * 3, [[0], list(range(9)), [1]], "bf16", 8, deadline_s=0.2)
    batches = [batch_for(rng, spec, heavy, 5) for heavy in (0, 3, 1)]
    layers.hub.doorbell.close()  # the host's thread is gone
    layers.hub.doorbell = Silent()
    start_s = time.perf_counter()
    outputs = step(layers, batches, 1)
    torch.cuda.synchronize()
    assert 0.15 < time.perf_counter() - start_s < 2
    want = wanted(layers, batches, 1, "bf16")
    compare(outputs[:1], want[:1], "of residents alone")
    assert torch.isnan(outputs[1]).all()
    places = {field: layers.hub.mailbox.addresses[field] for field in MailboxAddresses.__dataclass_fields__}
    layers.hub.doorbell = Doorbell(layers.hub.banks, MailboxAddresses(**places), DType.BF16, layers.pool)
    with pytest.raises(RuntimeError, match=r"MoE layer 1: the host did not answer within 0\.2 s"):
        layers.hub.check()
    for again in range(3):
        check(layers, batches, 1, "bf16", f"after the failure, {again}")
    layers.hub.close()


# ---- models ----
def deferring(name: str, num_deferred: int, place: str) -> Any:
    original = tiny.build(name)
    plan = monde.offload(copy.deepcopy(original), max_context=64).monde.plan
    share = {"host": 0, "mixed": 0.5, "gpu": 1}[place]
    gpu_memory = plan.gpu_used_bytes - plan.slots_bytes + int(share * plan.slots_bytes)
    return monde.offload(original, max_context=64, gpu_memory=gpu_memory, deferred_experts=num_deferred)


def on_device(model: Any) -> Any:
    """What test_deferral.decode calls, on the GPU."""

    def call(ids_BT: Tensor, **inputs: Any) -> Any:
        outputs = model(ids_BT.cuda(), use_cache=True, **inputs)
        outputs.logits = outputs.logits.cpu()
        return outputs

    return call


@pytest.mark.parametrize("place", ["host", "mixed", "gpu"])
@pytest.mark.parametrize(
    ("name", "num_deferred"),
    [("qwen3_moe", 1), ("qwen3_moe", 2), ("mixtral", 1), ("gpt_oss", 1), ("deepseek_v3", 3), ("olmoe", 1)],
)
def test_a_model_equals_plain_torch(name: str, num_deferred: int, place: str) -> None:
    ids = tiny.prompt(3, PROMPT + STEPS)
    call = on_device(deferring(name, num_deferred, place))
    tiny.assert_logits(decode(None, ids, call, call), expected_logits(name, num_deferred, ids))


@pytest.mark.parametrize("place", ["host", "mixed", "gpu"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_s_graph_equals_plain_torch(place: str, batch: int) -> None:
    model, num_steps = deferring("qwen3_moe", 2, place), CAPTURE_AFTER_STEPS + 12
    ids = tiny.prompt(batch, PROMPT + num_steps)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(ids[:, :PROMPT].cuda(), past_key_values=cache)
        steps = [
            model(ids[:, i : i + 1].cuda(), past_key_values=cache).logits.cpu()
            for i in range(PROMPT, ids.shape[1])
        ]
    assert model._decode_runner.num_replays >= 12
    original = tiny.build("qwen3_moe")
    original.set_experts_implementation("eager")
    want = long_reference(original, ids)
    exact = long_reference(tiny.in_float64(original), ids)
    rounding = float((want.double() - exact).abs().max())
    ulp = torch.finfo(want.dtype).eps * float(exact.abs().max())
    tiny.assert_logits(torch.cat(steps, dim=1), tiny.Expected(want, 8 * (rounding + ulp)))


def long_reference(original: Any, ids: Tensor) -> Tensor:
    """Teacher-forced steps of the slow twin, as many as there are tokens."""
    twin = DeferredReference(copy.deepcopy(original), 2)
    with torch.no_grad():
        cache = twin.prompt(ids[:, :PROMPT]).past_key_values
        steps = [
            twin.step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, ids.shape[1])
        ]
    return torch.cat(steps, dim=1)


def test_a_batch_that_decode_kernels_do_not_take() -> None:
    """More rows than MAX_DECODE_TOKENS: Python waits for the host, with the same answer."""
    ids = tiny.prompt(70, PROMPT + STEPS)
    call = on_device(deferring("qwen3_moe", 2, "mixed"))
    tiny.assert_logits(decode(None, ids, call, call), expected_logits("qwen3_moe", 2, ids))
