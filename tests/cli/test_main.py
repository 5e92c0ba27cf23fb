"""The command itself: version, help, info, and one line for every mistake."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from hostcompute.backends.select import choose
from monde.cli.errors import one_line_warnings
from monde.routing.heat import Heat
from tests.cli.conftest import MODEL, Monde, Outcome

ROOT = MODEL.parents[1]


def shell(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user runs it."""
    command = [sys.executable, "-m", "monde", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)


def test_version(monde: Monde) -> None:
    outcome = monde("--version")
    assert outcome.exit_code == 0
    assert outcome.stdout.startswith("monde 0.")


@pytest.mark.parametrize("command", ["generate", "bench", "plan", "info"])
def test_help_teaches_by_example(monde: Monde, command: str) -> None:
    outcome = monde(command, "--help")
    assert outcome.exit_code == 0
    assert f"monde {command}" in outcome.stdout.split("Examples")[1]


def test_help_needs_no_torch() -> None:
    code = "import sys; from monde.cli.main import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_info_says_which_backend_and_why(monde: Monde) -> None:
    outcome = monde("info")
    assert outcome.exit_code == 0
    choice = choose()
    assert f"{choice.name}, {choice.isa}: {choice.why}" in outcome.stdout
    assert "cuda" in outcome.stdout
    assert "huge pages" in outcome.stdout


MISTAKES = {
    "no such folder": (("bench", "./nowhere"), "no such folder"),
    "a file": (("bench", MODEL / "config.json"), "is a file"),
    "no config": (("generate", ROOT / "assets", "Hi"), "no config.json"),
    "unknown option": (("bench", MODEL, "--fast"), "--fast"),
    "missing argument": (("bench",), "MODEL"),
    "unknown command": (("serf",), "serf"),
    "empty prompt": (("generate", MODEL, ""), "PROMPT is empty"),
    "bananas": (("generate", MODEL, "Hi", "--host-memory", "12 bananas"), "12 bananas"),
    "more than the machine": (("generate", MODEL, "Hi", "--host-memory", "900TiB"), "host_memory"),
    "less than the model": (("generate", MODEL, "Hi", "--host-memory", "1KiB"), "host_memory"),
    "nothing to time": (("bench", MODEL, "-p", 0, "-n", 0), "nothing to time"),
    "not a number": (("bench", MODEL, "-p", "12,x"), "-p 12,x"),
    "negative": (("bench", MODEL, "-b", "0"), "-b 0"),
    "too long": (("bench", MODEL, "-p", 5000), "has 1024"),
    "unknown format": (("bench", MODEL, "-o", "xml"), "xml"),
    "unknown baseline": (("bench", MODEL, "--baseline", "vllm"), "--baseline vllm"),
    "unknown way": (("bench", MODEL, "--baseline", "transformers:magic"), "grouped_mm"),
    "plot suffix": (("bench", MODEL, "--plot", "speed.doc"), ".png"),
    "plot folder": (("bench", MODEL, "--plot", "nowhere/speed.png"), "nowhere"),
    "text missing": (("bench", MODEL, "--text", "nowhere.txt"), "nowhere.txt"),
    "two texts": (("bench", MODEL, "--text", MODEL / "config.json", "--random-tokens"), "give one of them"),
    "ranks without torchrun": (("generate", MODEL, "Hi", "--parallel", "peers"), "start monde with torchrun"),
    "seed": (("generate", MODEL, "Hi", "--seed", "-1"), "--seed"),
    "not UTF-8": (("generate", MODEL, "\udcff"), "not UTF-8"),
    "prompt too long": (("generate", MODEL, "word " * 2000, "-n", 5), "1024 positions"),
    "more than the stand-in": (
        ("generate", MODEL, "Hi", "--device", "cpu", "--gpu-memory", "900TiB"),
        "more than the",
    ),
    "no such device": (("generate", MODEL, "Hi", "--device", "abacus"), "abacus"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(monde: Monde, mistake: str) -> None:
    arguments, remedy = MISTAKES[mistake]
    outcome = monde(*arguments)
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("monde: error:")]
    assert outcome.exit_code == 2
    assert len(lines) == 1, outcome.stderr
    assert outcome.stderr.splitlines()[-1] == lines[0]
    assert remedy in lines[0]
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""


def test_a_model_without_tokenizer_cannot_read_a_prompt(monde: Monde, bare_model: Path) -> None:
    outcome = monde("generate", bare_model, "Hi")
    assert outcome.exit_code == 2
    assert "no tokenizer" in outcome.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_memory_without_a_gpu_is_refused(monde: Monde) -> None:
    outcome = monde("generate", MODEL, "Hi", "--gpu-memory", "1GiB")
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[-1].startswith("monde: error: gpu_memory: 1 GiB were asked for")


def test_a_damaged_tokenizer_is_named(monde: Monde, bare_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(bare_model, folder)
    (folder / "tokenizer.json").write_text("{garbage")
    outcome = monde("generate", folder, "Hi")
    assert outcome.exit_code == 2
    assert f"{folder}: its tokenizer cannot be read" in outcome.stderr


@pytest.mark.parametrize("command", [("generate", "{}", "Hi"), ("bench", "{}"), ("plan", "{}", "-m", "h200")])
def test_a_damaged_configuration_is_not_blamed_on_the_tokenizer(
    monde: Monde, tmp_path: Path, command: tuple[str, ...]
) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "damaged")
    (folder / "config.json").write_text("{garbage")
    outcome = monde(*(part.format(folder) for part in command))
    assert outcome.exit_code == 2
    assert f"monde: error: {folder}: its config.json cannot be read" in outcome.stderr
    assert "tokenizer" not in outcome.stderr


def test_a_dense_model_is_refused(monde: Monde, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    outcome = monde("bench", tmp_path, "-p", 8, "-n", 2, "-r", 1)
    assert outcome.exit_code == 2
    assert "monde: error:" in outcome.stderr.splitlines()[-1]


def test_from_a_shell() -> None:
    done = shell("bench", MODEL, "-p", 8, "-n", 2, "-r", 1, "-t", 1, "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [record["test"] for record in found] == ["pp8", "tg2"]
    assert found[0]["command"] == f"monde bench {MODEL} -p 8 -n 2 -r 1 -t 1 -o json"


def test_a_mistake_from_a_shell_has_no_traceback_unless_asked_for() -> None:
    done = shell("bench", "./nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("monde: error:")
    assert done.stderr.count("\n") == 1
    assert "Traceback" in shell("bench", "./nowhere", MONDE_DEBUG="1").stderr


@pytest.mark.parametrize("target", ["closed", "full"])
def test_output_that_goes_nowhere_is_an_error(target: str) -> None:
    redirect = {"closed": ">&-", "full": "> /dev/full"}[target]
    command = f"{shlex.quote(sys.executable)} -m monde info {redirect}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("monde: error:")
    assert done.stderr.count("\n") == 1


def test_closed_input_is_an_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m monde generate {shlex.quote(str(MODEL))} - <&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("monde: error: standard input is closed; give the prompt")
    assert done.stderr.count("\n") == 1


def test_nothing_asked_is_help() -> None:
    done = shell()
    assert done.returncode == 2
    assert "Usage: monde" in done.stdout + done.stderr
    assert "Error" not in done.stdout + done.stderr


def test_ctrl_c_is_one_line() -> None:
    # A sampled text: a greedy one may repeat a word without end, and words are printed when they are complete.
    options = ("-n", "1000", "-t", "1", "--temperature", "0.7", "--seed", "4")
    command = [sys.executable, "-m", "monde", "generate", str(MODEL), "It is a truth", *options]
    heard = partial(
        signal.signal, signal.SIGINT, signal.default_int_handler
    )  # jobs in a background ignore it
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=heard
    ) as run:
        assert run.stdout is not None
        run.stdout.read(1)  # it is generating
        run.send_signal(signal.SIGINT)
        _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130
    assert stderr.splitlines()[-1] == "monde: error: interrupted"
    assert "Traceback" not in stderr


def test_ctrl_c_during_imports_is_one_line() -> None:
    """The script that pip makes of pyproject.toml, interrupted when it reaches for its first large import."""
    module, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][
        "monde"
    ].split(":")
    code = f"""
import signal, sys
class Interrupt:
    def find_spec(self, name, *more):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
from {module} import {function}
sys.exit({function}())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (130, "monde: error: interrupted\n")


def warned_of(outcome: Outcome) -> list[str]:
    assert outcome.exit_code == 0, outcome.stderr
    assert ".py:" not in outcome.stderr
    return [line for line in outcome.stderr.splitlines() if line.startswith("monde: warning: ")]


def test_a_setting_without_effect_is_one_line(monde: Monde, tmp_path: Path) -> None:
    """On a CPU nobody has a slot, and nothing is split."""
    Heat("this model", tuple(np.ones(16, np.float32) for _ in range(4)), 1.0).save(tmp_path / "heat.json")
    short = ("bench", MODEL, "--device", "cpu", "-p", 4, "-n", 0, "-r", 1)
    assert warned_of(monde(*short)) == []
    for option, value in (
        ("residency", "lru"),
        ("residency", "static"),
        ("split-policy", "fiddler"),
        ("heat", tmp_path / "heat.json"),
    ):
        (line,) = warned_of(monde(*short, f"--{option}", value))
        name = {"heat": "heat_file"}.get(option, option.replace("-", "_"))
        assert line.startswith(
            f"monde: warning: {name} {value} changes nothing: all experts are on the host; "
        )
    assert (
        warned_of(monde(*short, "--residency", "lru", "--gpu-memory", "1GiB")) == []
    )  # the CPU stands in for a GPU


def test_a_seed_that_draws_nothing(monde: Monde) -> None:
    short = ("generate", MODEL, "Hi", "-n", 2, "--seed", 3)
    (line,) = warned_of(monde(*short))
    assert "--seed 3 changes nothing" in line
    assert warned_of(monde(*short, "--temperature", 0.5)) == []


def test_a_warning_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with one_line_warnings():
            warnings.warn("a\nb", stacklevel=1)
            warnings.warn("a b", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr().err == "monde: warning: a b\n"


def test_a_warning_has_its_place_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONDE_DEBUG", "1")
    with pytest.warns(UserWarning, match="as Python shows it"), one_line_warnings():
        warnings.warn("as Python shows it", stacklevel=1)


def test_an_instruction_set_that_is_absent_is_an_error() -> None:
    done = shell("info", MONDE_CPU_ISA="z80")
    assert done.returncode == 2
    assert done.stderr.startswith("monde: error: MONDE_CPU_ISA")
    assert "z80" in done.stderr
