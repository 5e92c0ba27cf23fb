"""Encoder-decoders on the command line: the encoder gets the prompt, the decoder generates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from monde.cli.decoder import choices_without_cache, decoder_of, start_token
from tests.cli.conftest import MODEL, Monde

WORDS = "It is a truth universally acknowledged, that a single man in possession of a good fortune"


def switch() -> Any:
    config = SwitchTransformersConfig(
        vocab_size=8192, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, num_decoder_layers=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0, pad_token_id=2,
        eos_token_id=0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config)


def nllb() -> Any:
    config = NllbMoeConfig(
        vocab_size=8192, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, num_experts=4, encoder_sparse_step=2,
        decoder_sparse_step=2, decoder_start_token_id=2, max_position_embeddings=128,
    )  # fmt: skip
    return NllbMoeForConditionalGeneration(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights, and the shipped model's tokenizer."""
    found = {}
    for name, make in (("switch", switch), ("nllb", nllb)):
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(found[name])
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(MODEL / file, found[name] / file)
    return found


@pytest.mark.parametrize("name", ["switch", "nllb"])
@torch.inference_mode()
def test_steps_are_those_of_generate(folders: dict[str, Path], name: str) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folders[name]).eval()
    prompt_BT = torch.randint(3, 8192, (2, 9), generator=torch.Generator().manual_seed(1))
    settings = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    expected_BT = model.generate(prompt_BT, **settings)[:, 1:]  # without the start token
    decoder = decoder_of(model)
    chosen = [decoder.read(prompt_BT)]
    for _ in range(5):
        chosen.append(decoder.step(torch.tensor(chosen[-1])[:, None]))
    assert torch.tensor(chosen).T.tolist() == expected_BT.tolist()
    fed_1T = torch.cat((torch.tensor([[start_token(model)]]), prompt_BT[:1, :3]), dim=1)
    decoder = decoder_of(model)
    stepped = [decoder.read(fed_1T), *(decoder.step(fed_1T[:, t : t + 1]) for t in range(1, 4))]
    assert [token for (token,) in stepped] == choices_without_cache(model, fed_1T)


@pytest.mark.parametrize(("name", "topk"), [("switch", 1), ("nllb", 2)])
def test_both_are_timed(monde: Monde, folders: dict[str, Path], name: str, topk: int) -> None:
    """One sparse layer in each half: a step reads the decoder's alone, two fp32 matrices of an expert."""
    outcome = monde("bench", folders[name], "-p", 8, "-n", 6, "-b", "1,2", "-r", 1, "-o", "json")
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert [(r["test"], r["n_seqs"]) for r in found] == [("pp8", 1), ("pp8", 2), ("tg6", 1), ("tg6", 2)]
    prompt, _, steps, _ = found
    assert prompt["ttft_s"] > 0 < steps["tpot_s"]
    step_bytes = topk * 2 * 32 * 64 * 4
    assert steps["host_weight_bytes_per_token"] == step_bytes
    assert 8 * prompt["host_weight_bytes_per_token"] >= 2 * step_bytes


def test_the_decoder_agrees_with_transformers(monde: Monde, folders: dict[str, Path], tmp_path: Path) -> None:
    options = ("-p", 0, "-n", 4, "-d", 16, "-r", 1, "--dtype", "fp32", "--trace", tmp_path / "t.json")
    outcome = monde("bench", folders["switch"], *options, "--baseline", "transformers", "-o", "json")
    assert outcome.exit_code == 0, outcome.stderr
    assert [r["agreement"] for r in json.loads(outcome.stdout)] == [1.0, 1.0]
    assert (tmp_path / "t.json").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("switch", ("-p", 8, "-d", 16), "give -p 0 with -d"),
        ("nllb", ("-p", 8, "-n", 0, "--baseline", "transformers"), "measure it without --baseline"),
    ],
)
def test_what_cannot_be_is_one_line(
    monde: Monde, folders: dict[str, Path], name: str, options: tuple[object, ...], remedy: str
) -> None:
    outcome = monde("bench", folders[name], *options)
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[-1].startswith("monde: error: ")
    assert remedy in outcome.stderr.splitlines()[-1]


def test_each_half_has_its_own_positions(monde: Monde, folders: dict[str, Path]) -> None:
    """100 positions of 128 are the prompt's or more, and 100 the answer's."""
    outcome = monde("generate", folders["nllb"], WORDS * 5, "-n", 100)
    assert outcome.exit_code == 0, outcome.stderr
    assert "first token after" in outcome.stderr
    assert "128 positions" in monde("generate", folders["nllb"], WORDS, "-n", 128).stderr
    assert "128 positions" in monde("generate", folders["nllb"], WORDS * 20, "-n", 1).stderr
