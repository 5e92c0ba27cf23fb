"""`monde train` from outside: a run that is killed goes on with the same losses, mistakes get one line."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    SwitchTransformersConfig,
)

from monde.cli.train import LINE_INTERVAL_S, check_model, progress_lines
from monde.training.config import read_config
from monde.training.job import StepRecord, read_losses

TOKENIZER = Path(__file__).parents[2] / "assets" / "moe-3m"
STEPS = 12
FIXED = "[parallel]\nchunks = [2, 3]\n"  # chunks that are measured may differ after a resume, and with them roundings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = OlmoeConfig(
        vocab_size=8192, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=2,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


def config_file(folder: Path, model: Path, out: str, more: str = "") -> Path:
    text = folder / "text.txt"
    text.write_text("The king and the queen went into the garden and spoke of the war. " * 50)
    path = folder / f"{out}.toml"
    path.write_text(
        f'[model]\npath = "{model}"\ninit = "random"\n[data]\ntext = "text.txt"\nsequence_length = 16\n'
        f"[optimizer]\nsteps = {STEPS}\nbatch = 4\nwarmup_steps = 3\n"
        f'[output]\nfolder = "{out}"\ncheckpoint_every = 3\n{more or FIXED}'
    )
    return path


def command(config: Path, num_ranks: int) -> list[str]:
    monde = ["-m", "monde", "train", str(config)]
    if num_ranks == 1:
        return [sys.executable, *monde]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_ranks}",
    ]
    return [*launcher, *monde]


def run(config: Path, num_ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(config, num_ranks), capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_kill_9_and_resume(tmp_path: Path, model: Path) -> None:
    whole, cut = config_file(tmp_path, model, "whole"), config_file(tmp_path, model, "cut")
    done = run(whole, 2)
    assert done.returncode == 0, done.stderr[-4000:]
    process = subprocess.Popen(command(cut, 2), stderr=subprocess.DEVNULL)
    losses = tmp_path / "cut" / "losses.jsonl"
    end_s = time.monotonic() + 200
    while len(read_losses(losses)) < 5:
        assert time.monotonic() < end_s
        assert process.poll() is None
        time.sleep(0.005)
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)]  # ranks have sessions of their own
    assert len(family) >= 3
    for member in family:
        member.kill()
    process.wait()
    assert len(read_losses(losses)) < STEPS, "the run was over before it was killed"
    finished = run(cut, 2)
    assert finished.returncode == 0, finished.stderr
    assert "resuming after step" in finished.stderr
    records = [read_losses(tmp_path / out / "losses.jsonl") for out in ("whole", "cut")]
    assert [r.loss for r in records[0]] == [r.loss for r in records[1]]
    assert len(records[0]) == STEPS
    assert (tmp_path / "cut" / "loss.png").stat().st_size > 1000
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "model")
    assert trained.config.num_experts == 4
    assert records[0][-1].loss < records[0][0].loss


def test_a_log_gets_a_line_now_and_then() -> None:
    now_s = [0.0]

    def steps() -> Iterator[StepRecord]:
        for step in range(100, 200):
            now_s[0] += LINE_INTERVAL_S / 30
            yield StepRecord(step, 3.0, 0.0, 1.0, 1e-3, 640, 0.5)

    lines = list(progress_lines(steps(), 200, lambda: now_s[0]))
    assert [line.split()[1] for line in lines] == ["101", "131", "161", "191", "200"]
    assert lines[0] == "step 101 of 200, loss 3.0000, 1,280 tokens/s"


def test_a_run_into_a_file_is_not_silent(tmp_path: Path, model: Path) -> None:
    done = run(config_file(tmp_path, model, "out"))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("monde: step ")]
    assert lines[0].startswith(f"monde: step 1 of {STEPS}, loss ")
    assert lines[-1].startswith(f"monde: step {STEPS} of {STEPS}, loss ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("[parallell]\nnodes = 1\n", "table [parallell] is unknown; expected model, output"),
        ("kept = 3\n", "output.kept is unknown; expected folder, checkpoint_every, keep"),
        ("keep = 'two'\n", "output.keep: expected int, got 'two'"),
        ("keep = 0\n", "output.checkpoint_every and keep must be at least 1"),
        ("[parallel]\nchunks = [2]\n", 'parallel.chunks must be "auto" or [forward, backward]'),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".*") as caught:
        read_config(config_file(tmp_path, tmp_path, "out", more))
    assert message in str(caught.value)


def test_one_line_for_users(tmp_path: Path, model: Path) -> None:
    missing = run(tmp_path / "no.toml")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "cannot be read" in missing.stderr
    alone = run(config_file(tmp_path, model, "out", "[parallel]\nnodes = 2\n"))
    assert alone.stderr == "monde: error: parallel.nodes is 2, but one rank runs; start it with torchrun\n"


def test_what_a_model_cannot_be_trained_on(tmp_path: Path, model: Path) -> None:
    config = read_config(config_file(tmp_path, model, "out"))
    long = replace(config, data=replace(config.data, sequence_length=5000))
    with pytest.raises(
        ValueError, match=r"data\.sequence_length is 5000, the model has 4096 positions; ask for no more"
    ):
        check_model(long, AutoConfig.from_pretrained(model))
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        check_model(config, SwitchTransformersConfig())


@pytest.mark.slow
def test_ranks_with_meshes_of_their_own_all_get_the_line(tmp_path: Path, model: Path) -> None:
    """Two nodes, each with its own copy of the file: told before a mesh is made, in which they would wait."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        config = config_file(tmp_path, model, f"out{rank}", f"[parallel]\nnodes = {rank + 1}\n")
        place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        environment["TORCHELASTIC_RUN_ID"] = "test"
        ranks.append(subprocess.Popen(command(config, 1), env=environment, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, told = process.communicate(timeout=50)  # below parallel.timeout_s
        assert process.returncode == 2, told
        line = "parallel.nodes: ranks disagree: rank 0 has 1, rank 1 has 2; start all ranks with the same arguments"
        assert told.splitlines()[-1] == f"monde: error: {line}"
