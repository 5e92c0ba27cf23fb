"""`monde generate`: the text, sampling, standard input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from monde.cli.generate import check_prompt, read_prompt
from tests.cli.conftest import MODEL, Monde

PROMPT = "It is a truth universally acknowledged, that"


def test_text_is_what_transformers_generates(monde: Monde) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    outcome = monde("generate", MODEL, PROMPT, "-n", 24, "--dtype", "fp32")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout.strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert "tokens/s" in outcome.stderr


def test_a_seed_repeats_a_sample(monde: Monde) -> None:
    def sample(seed: int) -> str:
        return monde("generate", MODEL, PROMPT, "-n", 16, "--temperature", 1.0, "--seed", seed).stdout

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_prompt_from_standard_input(monde: Monde) -> None:
    by_argument = monde("generate", MODEL, PROMPT, "-n", 8, "--dtype", "fp32").stdout
    assert monde("generate", MODEL, "-", "-n", 8, "--dtype", "fp32", stdin=PROMPT).stdout == by_argument


def test_one_token(monde: Monde) -> None:
    outcome = monde("generate", MODEL, PROMPT, "-n", 1)
    assert outcome.exit_code == 0
    assert "first token after" in outcome.stderr


@pytest.mark.parametrize(
    ("gpu_memory", "where"),
    [
        ("0", "; experts on the host (native"),
        ("80KiB", "; 1 of 64 experts on cpu, the other experts on the host (native"),
        ("1GiB", "; all 64 experts on cpu; loaded in"),
    ],
)
def test_the_summary_says_where_experts_are(monde: Monde, gpu_memory: str, where: str) -> None:
    options = ("--device", "cpu", "--gpu-memory", gpu_memory)
    outcome = monde("generate", MODEL, PROMPT, "-n", 1, *options)
    assert where in outcome.stderr.splitlines()[-1]


def test_the_budget_leaves_room_for_what_will_run(monde: Monde, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {}
    monkeypatch.setattr("monde.models.loading.from_pretrained", lambda model, **given: settings.update(given))
    with pytest.raises(AttributeError):  # there is no model to run
        monde("generate", MODEL, PROMPT, "-n", 24)
    assert settings["max_context"] == len(AutoTokenizer.from_pretrained(MODEL)(PROMPT)["input_ids"]) + 24
    with pytest.raises(AttributeError):
        monde("bench", MODEL, "-p", 300, "-n", 20, "-d", "0,200", "-b", "1,3")
    assert (settings["max_context"], settings["max_batch"]) == (500, 3)


def test_deferred_experts_change_the_text_as_from_pretrained_does(monde: Monde) -> None:
    import monde as library

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    texts = []
    for num_deferred in (0, 1):
        model: Any = library.from_pretrained(
            str(MODEL), device="cpu", dtype=torch.float32, deferred_experts=num_deferred
        )
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        texts.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert texts[0] != texts[1]
    outcome = monde("generate", MODEL, PROMPT, "-n", 24, "--dtype", "fp32", "--deferred-experts", 1)
    assert outcome.stdout.strip() == texts[1].strip()


def test_more_deferred_experts_than_a_token_has(monde: Monde) -> None:
    outcome = monde("generate", MODEL, PROMPT, "--deferred-experts", 2)
    assert outcome.exit_code != 0
    assert "deferred_experts: expected 0..1 for a model of 2 experts per token, got 2" in outcome.stderr


def test_standard_input_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would find another part of it, or none."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"standard input reaches one process, .* give the prompt as an argument"
    ):
        read_prompt("-")
    assert read_prompt("The king") == "The king"


def test_a_tokenizer_of_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=512))
    monkeypatch.setattr("monde.models.configuration.read_configuration", lambda model: config)
    with pytest.raises(
        ValueError, match="ids up to 8189, the model a vocabulary of 512; put the model's own"
    ):
        check_prompt("model", torch.tensor([[5, 8189]]), 1)
