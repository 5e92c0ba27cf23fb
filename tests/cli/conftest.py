"""The shipped model, variants of it with something missing, and the command line as a function."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from monde.cli.main import app

MODEL = Path(__file__).resolve().parents[2] / "assets" / "moe-3m"


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    stdout: str
    stderr: str


Monde = Callable[..., Outcome]


@pytest.fixture
def monde() -> Monde:
    """`monde("bench", MODEL, "-p", 8)` in this process."""

    def call(*arguments: object, stdin: str | None = None) -> Outcome:
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, prog_name="monde")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model without its tokenizer."""
    folder = tmp_path_factory.mktemp("bare") / "bare-model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(MODEL / name, folder / name)
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A model this small is slowed by threads that wait for each other."""
    import torch

    torch.set_num_threads(1)
