"""Expert deferral: equal to plain torch, whoever computes; off by default; nothing is left from one step to another."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import StaticCache, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import monde
from monde.core import RoutedBatch
from monde.executors.deferral import DeferredSteps
from monde.models.decode_runner import CAPTURE_AFTER_STEPS
from monde.routing.deferral import apart, deferred_pairs_TK
from tests.monde import tiny
from tests.monde.deferred_reference import DeferredReference
from tests.monde.eager_capture import with_graphs

PROMPT, STEPS = 6, 8


def deferring(name: str, num_deferred: int, **settings: Any) -> Any:
    return monde.offload(tiny.build(name), device="cpu", deferred_experts=num_deferred, **settings)


def decode(model: Any, ids: Tensor, prompt: Any = None, step: Any = None) -> Tensor:
    """Logits [B, STEPS + 1, V]: of the prompt's last position, and of teacher-forced decode steps."""
    prompt, step = (model if call is None else call for call in (prompt, step))
    with torch.no_grad():
        first = prompt(ids[:, :PROMPT])
        cache = first.past_key_values
        steps = [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, PROMPT + STEPS)]
    return torch.cat([first.logits[:, -1:], *steps], dim=1)


def reference(original: Any, num_deferred: int, ids: Tensor) -> Tensor:
    twin = DeferredReference(copy.deepcopy(original), num_deferred)
    return decode(twin.model, ids, twin.prompt, twin.step)


def expected(name: str, num_deferred: int, ids: Tensor) -> tiny.Expected:
    """As tiny.expected, of the slow twin in the model's precision and in float64."""
    original = tiny.build(name)
    original.set_experts_implementation("eager")
    logits = reference(original, num_deferred, ids)
    exact = reference(tiny.in_float64(original), num_deferred, ids)
    rounding = float((logits.double() - exact).abs().max())
    ulp = torch.finfo(logits.dtype).eps * float(exact.abs().max())
    return tiny.Expected(logits, 8 * (rounding + ulp))


# ---- which pairs ----
@given(
    st.integers(1, 8).flatmap(
        lambda k: st.tuples(
            st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5]), min_size=k, max_size=k), max_size=5),
            st.integers(0, k - 1),
        )
    )
)
def test_the_lightest_pairs_are_deferred_and_of_equal_ones_the_last(case: tuple[list[Any], int]) -> None:
    weights, num_deferred = case
    got = deferred_pairs_TK(torch.tensor(weights).reshape(len(weights), -1), num_deferred) if weights else []
    for row, chosen in zip(weights, got, strict=True):
        order = sorted(range(len(row)), key=lambda k: (-row[k], k))
        assert sorted(chosen.nonzero().flatten().tolist()) == sorted(order[len(row) - num_deferred :])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_pair_is_in_one_half(dtype: torch.dtype) -> None:
    ids_TK = torch.tensor([[3, 1, 2], [7, -1, 4]])
    weights_TK = torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.3, 0.5]], dtype=dtype)
    both = apart(RoutedBatch(torch.ones(2, 4), ids_TK, weights_TK), 1)
    assert both.topk_ids_TK.tolist() == [[-1, 1, 2], [-1, -1, 4], [3, -1, -1], [7, -1, -1]]
    assert both.x_TD.shape == (4, 4)
    assert both.topk_weights_TK.dtype is dtype


# ---- the answer ----
@pytest.mark.parametrize("gpu_memory", [0, "30KB", "10MB"], ids=["host", "some resident", "all resident"])
@pytest.mark.parametrize(
    ("name", "num_deferred"),
    [("qwen3_moe", 1), ("qwen3_moe", 2), ("mixtral", 1), ("gpt_oss", 1), ("deepseek_v3", 3), ("olmoe", 1)],
)
def test_equals_plain_torch_wherever_experts_are(name: str, num_deferred: int, gpu_memory: Any) -> None:
    ids = tiny.prompt(3, PROMPT + STEPS)
    want = expected(name, num_deferred, ids)
    got = decode(deferring(name, num_deferred, gpu_memory=gpu_memory), ids)
    tiny.assert_logits(got, want)
    exact = decode(tiny.build(name), ids)
    tiny.assert_logits(got[:, :1], tiny.Expected(exact[:, :1], want.tolerance))  # a prompt is as ever
    assert float((got - exact)[:, 1:].abs().amax(dim=(0, 2)).min()) > 10 * want.tolerance  # a step is not


@pytest.mark.parametrize("backend", ["native", "numba", "reference"])
def test_any_backend(backend: str) -> None:
    ids = tiny.prompt(2, PROMPT + STEPS)
    model = deferring("qwen3_moe", 2, cpu_backend=backend)
    tiny.assert_logits(decode(model, ids), expected("qwen3_moe", 2, ids))


def test_off_by_default() -> None:
    model = monde.offload(tiny.build("qwen3_moe"), device="cpu")
    assert model.monde.deferred is None
    assert model.monde.fronts is model.monde.layers


def test_three_ways_in_defer(way: Any, checkpoints: Any) -> None:
    ids = tiny.prompt(2, PROMPT + STEPS)
    model = way(checkpoints("qwen3_moe"), deferred_experts=2)
    tiny.assert_logits(decode(model, ids), expected("qwen3_moe", 2, ids))


def test_counters_count_every_pair_once() -> None:
    model, ids = deferring("qwen3_moe", 2, gpu_memory="30KB"), tiny.prompt(2, PROMPT + STEPS)
    model.monde.reset_counters()
    decode(model, ids)
    counters = model.monde.counters()
    assert counters.num_steps == 1 + STEPS
    assert counters.num_pairs == ids.numel() * 2 * 3


# ---- recorded, compiled, copied ----
def test_recorded_steps_choose_the_same_tokens() -> None:
    plain, recorded = deferring("qwen3_moe", 2), with_graphs(deferring("qwen3_moe", 2))
    settings: dict[str, Any] = {"max_new_tokens": CAPTURE_AFTER_STEPS + 12, "do_sample": False}
    for batch in (2, 1):
        ids = tiny.prompt(batch)
        settings["attention_mask"] = torch.ones_like(ids)
        assert torch.equal(recorded.generate(ids, **settings), plain.generate(ids, **settings))
    assert recorded._decode_runner.num_replays > 0


def test_a_static_cache_and_positional_arguments() -> None:
    model, ids = deferring("qwen3_moe", 2), tiny.prompt(2, PROMPT + STEPS)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids[:, :PROMPT], None, None, cache)
        steps = [
            model(ids[:, i : i + 1], None, None, cache).logits[:, -1] for i in range(PROMPT, ids.shape[1])
        ]
    want = expected("qwen3_moe", 2, ids)
    tiny.assert_logits(torch.stack(steps, dim=1), tiny.Expected(want.logits[:, 1:], want.tolerance))


def test_embeddings_instead_of_ids() -> None:
    model, ids = deferring("qwen3_moe", 2), tiny.prompt(2, PROMPT + STEPS)
    embed = model.get_input_embeddings()
    got = decode(model, ids, step=lambda ids_B1, **kw: model(inputs_embeds=embed(ids_B1), **kw))
    tiny.assert_logits(got, expected("qwen3_moe", 2, ids))


def test_compiled() -> None:
    """The model, its forward, and what calls it, where Dynamo steps around the hooks or says why it cannot."""
    model, ids = deferring("qwen3_moe", 2), tiny.prompt(2, PROMPT + STEPS)
    want = expected("qwen3_moe", 2, ids)
    torch._dynamo.reset()
    for fullgraph in (False, True):
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        tiny.assert_logits(decode(model, ids, compiled, compiled), want)

    def call(ids_BT: Tensor, **kwargs: Any) -> Any:
        return model(ids_BT, **kwargs)

    compiled = torch.compile(call, backend="eager")
    tiny.assert_logits(decode(model, ids, compiled, compiled), want)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="deferred_experts: compile the model"):
        decode(model, ids, compiled, compiled)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    tiny.assert_logits(decode(model, ids), want)


def test_a_copy_defers_too() -> None:
    ids = tiny.prompt(2, PROMPT + STEPS)
    model = deferring("qwen3_moe", 2)
    tiny.assert_logits(decode(copy.deepcopy(model), ids), expected("qwen3_moe", 2, ids))


def test_threads_do_not_share_a_step() -> None:
    model = deferring("qwen3_moe", 2)
    prompts = [tiny.prompt(batch, PROMPT + STEPS) for batch in (1, 3)]
    want = [decode(model, ids) for ids in prompts]
    got: dict[int, list[Tensor]] = {0: [], 1: []}

    def run(which: int) -> None:
        for _ in range(5):
            got[which].append(decode(model, prompts[which]))

    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in (0, 1):
        assert len(got[which]) == 5
        for logits in got[which]:
            torch.testing.assert_close(logits, want[which], rtol=1e-4, atol=1e-5)


# ---- nothing is left over ----
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", ["decode", "prompt", "another batch", "the inner model"])
def test_a_step_cut_short_leaves_nothing(kind: type[BaseException], after: str) -> None:
    model, fresh = deferring("qwen3_moe", 2), deferring("qwen3_moe", 2)
    ids = tiny.prompt(2, PROMPT + STEPS)
    with torch.no_grad():
        cache = model(ids[:, :PROMPT]).past_key_values

    def stop(*args: Any) -> None:
        raise kind("cut short")

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(stop)
    with pytest.raises(kind, match="cut short"), torch.no_grad():
        model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
    handle.remove()
    assert model.monde.deferred.take() is not None or after != "decode"  # the test's own premise
    if after == "the inner model":
        with torch.no_grad():
            inner = [m.model(ids[:, :1]).last_hidden_state for m in (model, fresh)]
        torch.testing.assert_close(*inner, rtol=0, atol=0)
    elif after == "prompt":
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, fresh(ids).logits, rtol=0, atol=0)
    else:
        again = ids if after == "decode" else tiny.prompt(5, PROMPT + STEPS)
        assert torch.equal(decode(model, again), decode(fresh, again))


def test_layers_out_of_order_are_an_error() -> None:
    model, ids = deferring("qwen3_moe", 2), tiny.prompt(2, PROMPT + STEPS)
    with torch.no_grad():
        cache = model(ids[:, :PROMPT]).past_key_values
        model.model.layers[0].mlp.experts, model.model.layers[1].mlp.experts = (
            model.model.layers[1].mlp.experts,
            model.model.layers[0].mlp.experts,
        )
        with pytest.raises(RuntimeError, match="MoE layer 1 was called where layer 0 was due"):
            model(ids[:, :1], past_key_values=cache)


def test_a_layer_that_is_not_called_is_an_error() -> None:
    steps = DeferredSteps(1, 3)
    steps.begin(True)
    assert steps.enter(0)
    assert steps.enter(1)
    with pytest.raises(RuntimeError, match="ended after 2 of 3 MoE layers"):
        steps.end()
    assert not steps.enter(0)
    steps.end()


# ---- refused ----
@pytest.mark.parametrize("value", [-1, 1.0, "2", True, None])
def test_no_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match="deferred_experts: expected a whole number from 0 up"):
        monde.MondeConfig(deferred_experts=value)


def test_as_many_as_a_token_takes(way: Any, checkpoints: Any) -> None:
    with pytest.raises(ValueError, match=r"expected 0\.\.2 for a model of 3 experts per token, got 3"):
        way(checkpoints("qwen3_moe"), deferred_experts=3)


def test_as_many_as_a_layer_takes() -> None:
    """Where the configuration does not say, the first decode step does."""
    with pytest.raises(ValueError, match=r"expected 0\.\.1 in a layer that takes 2 experts per token, got 2"):
        deferred_pairs_TK(torch.ones(4, 2), 2)


def test_encoder_decoders_are_refused() -> None:
    config = SwitchTransformersConfig(
        vocab_size=64,
        d_model=16,
        d_ff=32,
        d_kv=4,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=4,
    )
    with pytest.raises(ValueError, match="deferred_experts: encoder-decoders are run without it"):
        monde.offload(SwitchTransformersForConditionalGeneration(config), device="cpu", deferred_experts=1)
