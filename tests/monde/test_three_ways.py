"""The three ways to a running model give the original's answers and give its weights back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import monde
from tests.monde import tiny


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_and_greedy_text(name: str, sharded: bool, way: Any, checkpoints: Any) -> None:
    folder, ids = checkpoints(name, sharded), tiny.prompt()
    original = AutoModelForCausalLM.from_pretrained(folder)
    model = way(folder)
    with torch.no_grad():
        tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
    assert torch.equal(tiny.greedy(model, ids), tiny.greedy(original, ids))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_bf16_checkpoint(name: str, way: Any, checkpoints: Any) -> None:
    folder, ids = checkpoints(name, dtype=torch.bfloat16), tiny.prompt()
    # Against float32 arithmetic on the same weights: monde must not be worse than the original's own bf16.
    original = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        exact = tiny.in_float64(original)(ids).logits
        own_error = (original(ids).logits.double() - exact).abs().mean()
        model = way(folder)
        assert next(model.parameters()).dtype == torch.bfloat16
        error = (model(ids).logits.double() - exact).abs().mean()
    assert error <= 1.5 * own_error


@pytest.mark.parametrize("name", tiny.NAMES)
def test_state_dict_and_save_pretrained_round_trip(
    name: str, way: Any, checkpoints: Any, tmp_path: Path
) -> None:
    folder = checkpoints(name, sharded=True)
    original = AutoModelForCausalLM.from_pretrained(folder)
    for gpu_memory in (0, "40KB"):
        model = way(folder, gpu_memory=gpu_memory)
        _assert_same_weights(model.state_dict(), original.state_dict())
        model.save_pretrained(tmp_path / str(gpu_memory))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(gpu_memory))
        _assert_same_weights(again.state_dict(), original.state_dict())


def _assert_same_weights(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    different = [
        key for key in want if got[key].dtype != want[key].dtype or not torch.equal(got[key], want[key])
    ]
    assert different == []


def test_dtype_is_the_callers(checkpoints: Any) -> None:
    folder, ids = checkpoints("mixtral", dtype=torch.bfloat16), tiny.prompt()
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = monde.from_pretrained(str(folder), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))


def test_tied_weights_count_once() -> None:
    """While a checkpoint is read they are still two."""
    folder = Path(__file__).parents[2] / "assets" / "moe-3m"
    model = monde.from_pretrained(folder, device="cpu")
    assert model.config.tie_word_embeddings
    held_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert model.monde.plan.size.dense_bytes == held_bytes


def test_load_report_and_counters(way: Any, checkpoints: Any) -> None:
    model = way(checkpoints("qwen3_moe"))
    engine = model.monde
    original = tiny.build("qwen3_moe")
    experts = sum(p.nbytes for n, p in original.named_parameters() if ".experts." in n)
    report = engine.load_report
    assert (report.num_moe_layers, report.num_experts, report.num_resident_experts) == (2, 16, 0)
    assert report.expert_bytes == experts
    assert report.dense_bytes >= sum(p.nbytes for p in original.parameters()) - experts
    assert report.seconds_s > 0
    engine.reset_counters()
    model(tiny.prompt(2, 12))
    counters = engine.counters()
    assert counters.num_steps == 1
    assert counters.num_pairs == 2 * 2 * 12 * 3
    assert counters.host_weight_bytes > 0
    assert counters.host_busy_s > 0
    assert (counters.num_resident_pairs, counters.h2d_bytes, counters.d2h_bytes) == (0, 0, 0)
    assert engine.host_choice.why


def test_two_models_in_one_process(checkpoints: Any) -> None:
    ids = tiny.prompt()
    a, b = (monde.from_pretrained(str(checkpoints(name)), device="cpu") for name in ("mixtral", "olmoe"))
    first = a(ids).logits
    b(ids)
    assert torch.equal(a(ids).logits, first)
    del b
    assert torch.equal(a(ids).logits, first)


def test_settings_of_the_configuration_are_taken_as_transformers_takes_them(checkpoints: Any) -> None:
    """In from_pretrained, as where transformers reads config.json; its own arguments stay its own."""
    folder, ids = checkpoints("mixtral"), tiny.prompt()
    settings: dict[str, Any] = {"num_experts_per_tok": 1, "rms_norm_eps": 0.5, "dtype": torch.float32}
    original = AutoModelForCausalLM.from_pretrained(folder, **settings)
    model: Any = monde.from_pretrained(folder, device="cpu", **settings)
    assert (model.config.num_experts_per_tok, model.config.rms_norm_eps) == (1, 0.5)
    with torch.no_grad():
        tiny.assert_logits(model(ids).logits, tiny.expected(original, ids))
        assert not torch.allclose(
            original(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits, atol=1e-3
        )
