"""Decode steps recorded and replayed on the CPU: buffers, caches, keys and fall-backs; the text never changes."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache, set_seed

import monde
from monde.models.decode_cache import KvRoom
from monde.models.decode_runner import CAPTURE_AFTER_STEPS, NUM_WARM_UPS
from tests.monde import tiny
from tests.monde.eager_capture import CountingHooks, with_graphs

NEW = (
    CAPTURE_AFTER_STEPS + 12
)  # tokens; the first comes from the prompt, a few steps are eager, the rest replayed
REPLAYS = NEW - 1 - CAPTURE_AFTER_STEPS


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    """A fall-back that no test expects is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decode steps run eagerly")
        yield


def pair(name: str = "qwen3_moe", **settings: Any) -> tuple[Any, Any]:
    """(original, the same with recorded decode steps)."""
    return tiny.build(name), with_graphs(tiny.build(name), **settings)


def runner(model: Any) -> Any:
    return model._decode_runner


def generate(model: Any, ids: Tensor, num_new: int = NEW, **settings: Any) -> Any:
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None} | settings
    return model.generate(ids, max_new_tokens=num_new, **settings)


def left_padded(batch: int, length: int, pads: list[int]) -> tuple[Tensor, Tensor]:
    ids = tiny.prompt(batch, length)
    mask = torch.ones_like(ids)
    for row, num_pads in enumerate(pads):
        mask[row, :num_pads] = 0
    return ids.masked_fill(mask == 0, 2), mask


# ---- the same text ----
@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy(name: str, batch: int) -> None:
    original, model = pair(name)
    ids = tiny.prompt(batch)
    assert torch.equal(generate(model, ids), generate(original, ids))
    assert runner(model).num_captures == 1
    assert runner(model).num_replays == REPLAYS
    assert runner(model).capture.num_warm_ups == NUM_WARM_UPS


def test_left_padding() -> None:
    original, model = pair()
    ids, mask = left_padded(3, 10, [4, 0, 7])
    want = generate(original, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask), want)
    assert runner(model).num_replays == REPLAYS


def test_other_padding_in_the_same_graph() -> None:
    original, model = pair()
    for pads in ([4, 0, 7], [0, 9, 1]):
        ids, mask = left_padded(3, 10, pads)
        want = generate(original, ids, attention_mask=mask)
        assert torch.equal(generate(model, ids, attention_mask=mask), want)
    assert runner(model).num_captures == 1


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams(settings: dict[str, int]) -> None:
    original, model = pair()
    ids = tiny.prompt(2)
    for _ in range(2):  # the second finds the graph, and the cache that reordering replaced
        assert torch.equal(generate(model, ids, **settings), generate(original, ids, **settings))
    assert runner(model).num_captures == 1
    assert runner(model).num_replays > REPLAYS


def test_sampling_with_a_seed() -> None:
    texts = []
    for model in pair():
        set_seed(7)
        texts.append(generate(model, tiny.prompt(2), do_sample=True, top_k=8, num_return_sequences=2))
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_sliding_window_shorter_than_the_text(name: str) -> None:
    models = pair(name)
    for model in models:
        model.config.sliding_window = 6
        for layer in model.model.layers:
            if hasattr(layer.self_attn, "sliding_window"):
                layer.self_attn.sliding_window = 6
    ids = tiny.prompt(2, 9)
    assert torch.equal(generate(models[1], ids), generate(models[0], ids))
    assert runner(models[1]).num_replays == REPLAYS


def test_logits_of_every_step() -> None:
    original, model = pair()
    ids = tiny.prompt(2)
    want, got = (
        generate(m, ids, return_dict_in_generate=True, output_logits=True).logits for m in (original, model)
    )
    whole = tiny.expected(original, ids)
    for got_BV, want_BV in zip(got, want, strict=True):
        tiny.assert_logits(got_BV, tiny.Expected(want_BV, whole.tolerance))


def test_experts_run_by_monde() -> None:
    original = tiny.build("qwen3_moe")
    model = with_graphs(monde.offload(copy.deepcopy(original), device="cpu", gpu_memory="30KB"))
    ids = tiny.prompt(2)
    assert torch.equal(generate(model, ids), generate(original, ids))
    assert runner(model).num_replays == REPLAYS


# ---- one graph for many calls ----
def test_calls_of_one_size_capture_once() -> None:
    original, model = pair()
    for length in (3, 12, 7):
        ids = tiny.prompt(2, length)
        assert torch.equal(generate(model, ids), generate(original, ids))
    assert runner(model).num_captures == 1
    assert runner(model).num_replays == 3 * (NEW - 1) - CAPTURE_AFTER_STEPS


def test_other_batches_and_lengths_capture_again() -> None:
    original, model = pair()
    sizes = [(1, 5, NEW), (2, 5, NEW), (1, 5, 180), (1, 100, 100), (1, 200, NEW), (1, 200, 100), (2, 6, NEW)]
    for batch, length, num_new in sizes:
        ids = tiny.prompt(batch, length)
        assert torch.equal(generate(model, ids, num_new), generate(original, ids, num_new))
    assert runner(model).num_captures == 3  # 1 x 256, 2 x 256, 1 x 512 positions


def test_short_generations_do_not_capture() -> None:
    _, model = pair()
    generate(model, tiny.prompt(1), CAPTURE_AFTER_STEPS)
    assert runner(model).num_captures == 0
    generate(model, tiny.prompt(1), 4)  # many short ones do
    assert runner(model).num_captures == 1


def test_idle_caches_stay_within_the_room() -> None:
    _, model = pair(room=KvRoom(bytes=3 * 256, bytes_per_token=1))
    for batch in (1, 2, 3):
        generate(model, tiny.prompt(batch))
        gc.collect()
        held = [idle.cache.layers[0].keys.shape[:3] for idle in runner(model).pool._idle]
        assert sum(rows * positions for rows, _, positions in held) <= 3 * 256
    assert [rows for rows, _, _ in held] == [3]


def test_a_cache_that_is_returned_serves_nobody_else() -> None:
    original, model = pair()
    ids = tiny.prompt(2)
    first = generate(model, ids, return_dict_in_generate=True)
    kept = first.past_key_values.layers[0].keys.clone()
    generate(model, ids.flip(0))
    assert torch.equal(first.past_key_values.layers[0].keys, kept)
    # and goes on where it stopped, with its own graph
    more = torch.cat([first.sequences, tiny.prompt(2, 3)], dim=1)
    num_captures = runner(model).num_captures
    got = generate(model, more, past_key_values=first.past_key_values)
    assert torch.equal(got, generate(original, more))
    assert runner(model).num_captures == num_captures


def test_graphs_die_with_their_cache() -> None:
    _, model = pair()
    result = generate(model, tiny.prompt(1), return_dict_in_generate=True)
    cache = weakref.ref(result.past_key_values)
    assert len(runner(model)._on_cache) == 1
    del result
    gc.collect()
    assert cache() is None
    assert len(runner(model)._on_cache) == 0


def test_moving_the_model_forgets_graphs() -> None:
    original, model = pair()
    ids = tiny.prompt(2)
    generate(model, ids)
    model.double().set_experts_implementation("eager")
    assert torch.equal(generate(model, ids), generate(tiny.in_float64(original), ids))
    assert runner(model).num_captures == 2


def test_inference_mode_and_back() -> None:
    original, model = pair()
    ids = tiny.prompt(2)
    want = generate(original, ids)
    with torch.inference_mode():
        assert torch.equal(generate(model, ids), want)
    assert torch.equal(generate(model, ids), want)
    assert runner(model).num_captures == 2


def test_after_an_interrupted_generation() -> None:
    original, model = pair()
    ids = tiny.prompt(2)

    class Stop(Exception):
        pass

    def stop(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 12 + CAPTURE_AFTER_STEPS + 4:
            raise Stop
        return scores

    with pytest.raises(Stop):
        generate(model, ids, logits_processor=[stop])
    assert torch.equal(generate(model, ids), generate(original, ids))
    assert runner(model).num_captures == 1


# ---- direct calls ----
def test_own_loop_with_a_static_cache() -> None:
    """Logits stay what they were after later steps, and positions come from the cache alone."""
    original, model = pair()
    ids = tiny.prompt(2, 30)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(6, 30)]
    want = tiny.expected(original, ids)
    tiny.assert_logits(torch.cat(steps, dim=1), tiny.Expected(want.logits[:, 6:], want.tolerance))
    assert runner(model).num_replays == 24 - CAPTURE_AFTER_STEPS
    assert int(cache.get_seq_length()) == 30


def test_compiled_models_step_aside() -> None:
    original, model = pair()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = tiny.prompt()
    with torch.no_grad():
        tiny.assert_logits(compiled(ids).logits, tiny.expected(original, ids))
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(ids, past_key_values=cache)
        compiled(ids[:, :1], past_key_values=cache)
    assert runner(model).num_captures == 0
    assert torch.equal(generate(compiled, ids), generate(original, ids))
    assert runner(model).num_captures == 1


def test_a_compiled_forward_is_recorded_as_it_is() -> None:
    original, model = pair()
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", dynamic=False)
    ids = tiny.prompt()
    assert torch.equal(generate(model, ids), generate(original, ids))
    assert runner(model).num_replays == REPLAYS


def test_deepcopy_starts_without_graphs() -> None:
    original, model = pair()
    ids = tiny.prompt(2)
    generate(model, ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for param in twin.parameters():
            param.mul_(1.5)
        for param in original.parameters():
            param.mul_(1.5)
    assert torch.equal(generate(twin, ids), generate(original, ids))
    assert runner(twin).num_captures == runner(model).num_captures == 1


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_loaded_afterwards_are_those_that_run(assign: bool) -> None:
    original, model = pair()
    ids = tiny.prompt()
    generate(model, ids)
    held = weakref.ref(next(iter(runner(model)._on_cache)))
    other = {name: tensor * 1.5 for name, tensor in original.state_dict().items()}
    for one in (original, model):
        one.load_state_dict(other, assign=assign)
    assert torch.equal(generate(model, ids), generate(original, ids))
    gc.collect()
    assert held() is None  # a graph knows the addresses that parameters had


def test_the_class_keeps_its_name() -> None:
    original, model = pair()
    assert type(model).__name__ == type(original).__name__
    assert isinstance(model, type(original))
    assert model.state_dict().keys() == original.state_dict().keys()


# ---- hooks ----
def test_the_engine_hears_of_every_decode_step() -> None:
    hooks = CountingHooks()
    _, model = pair(engine=hooks)
    generate(model, tiny.prompt(1))
    assert hooks.num_steps == NEW - 1
    assert not hooks.is_open


def test_a_failure_after_the_step_reaches_the_caller() -> None:
    class Dead(CountingHooks):
        def end_step(self) -> None:
            super().end_step()
            if self.num_steps == CAPTURE_AFTER_STEPS + 3:
                raise RuntimeError("the host of layer 1 is late")

    original, model = pair(engine=Dead())
    with pytest.raises(RuntimeError, match="layer 1 is late"):
        generate(model, tiny.prompt(1))
    assert torch.equal(generate(model, tiny.prompt(1)), generate(original, tiny.prompt(1)))


# ---- eager, saying why once ----
FALL_BACKS: list[tuple[str, dict[str, Any]]] = [
    ("cache_implementation='dynamic'", {"cache_implementation": "dynamic"}),
    ("output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}),
    ("assisted generation", {"prompt_lookup_num_tokens": 3}),
    ("positions of keys and values need", {"num_new": 200}),
]


@pytest.mark.parametrize(("reason", "settings"), FALL_BACKS, ids=lambda v: v if isinstance(v, str) else "")
def test_fall_back_of_generate(reason: str, settings: dict[str, Any]) -> None:
    original, model = pair(room=KvRoom(bytes=200, bytes_per_token=1))
    ids = tiny.prompt(1)
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        results = [generate(model, ids, **settings) for _ in range(2)]
    assert len([w for w in caught if "run eagerly" in str(w.message) and reason in str(w.message)]) == 1
    want = generate(original, ids, **settings)
    for got in results:
        assert torch.equal(getattr(got, "sequences", got), getattr(want, "sequences", want))
    assert runner(model).num_captures == 0


def test_fall_back_of_a_dynamic_cache() -> None:
    original, model = pair()
    ids = tiny.prompt(1)
    with pytest.warns(RuntimeWarning, match="the cache is a DynamicCache") as caught:
        got = generate(model, ids, past_key_values=DynamicCache(config=model.config))
    assert len(caught) == 1
    assert torch.equal(got, generate(original, ids))


def test_fall_back_of_a_growing_mask() -> None:
    original, model = pair()
    ids, mask = left_padded(2, 20, [3, 0])
    cache = StaticCache(config=model.config, max_cache_len=64)

    def steps() -> Tensor:
        model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        logits = [
            model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
            for i in range(6, 20)
        ]
        return torch.cat(logits, dim=1)

    with torch.no_grad(), pytest.warns(RuntimeWarning, match="2-D attention mask") as caught:
        got = steps()
    assert len(caught) == 1
    want = tiny.expected(original, ids, attention_mask=mask)
    tiny.assert_logits(got, tiny.Expected(want.logits[:, 6:], want.tolerance))


def test_fall_back_of_a_failed_capture() -> None:
    original, model = pair(failure="operation not permitted when stream is capturing")
    ids = tiny.prompt(2)
    with pytest.warns(RuntimeWarning, match="capture failed: operation not permitted") as caught:
        results = [generate(model, ids) for _ in range(2)]
    assert len(caught) == 1
    assert all(torch.equal(got, generate(original, ids)) for got in results)


def test_fall_back_of_a_failing_warm_up_leaves_the_cache_alone() -> None:
    original, model = pair()
    calls = 0

    def fail(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1 + CAPTURE_AFTER_STEPS + 2:
            raise RuntimeError("no")

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.warns(RuntimeWarning, match="capture failed: no"):
        assert torch.equal(generate(model, tiny.prompt(2)), generate(original, tiny.prompt(2)))


def test_nothing_is_said_where_no_graph_could_help() -> None:
    _, model = pair()
    ids = tiny.prompt(2)
    generate(model, ids, use_cache=False, num_new=3)
    with torch.no_grad():
        model(ids[:, :1])
    model(ids[:, :1], past_key_values=DynamicCache(config=model.config))  # with gradients
