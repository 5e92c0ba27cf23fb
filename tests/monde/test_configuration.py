"""Where a model's configuration comes from, and the one line for each way in which it does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

import monde
from monde.models.configuration import read_configuration

_ASK = """
import json, sys, monde
for repo_id, settings in json.loads(sys.argv[1]):
    try:
        monde.from_pretrained(repo_id, **settings)
    except FileNotFoundError as error:
        print(json.dumps(str(error)))
"""


class _Hub(BaseHTTPRequestHandler):
    """Answers every question with the error that the asked repository is named after."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        status, code = {
            "secret": (403, "GatedRepo"),
            "other": (404, "EntryNotFound"),
            "old": (404, "RevisionNotFound"),
            "broken": (503, ""),
        }.get(self.path.split("/")[2], (404, "RepoNotFound"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub on this machine."""
    with HTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(hub: str, cache: Path, *questions: tuple[str, dict[str, Any]]) -> list[str]:
    """What from_pretrained says of each, in a process that knows no other hub and has nothing in its cache."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", _ASK, json.dumps(questions)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_that_says_no_is_asked_once(hub: str, tmp_path: Path) -> None:
    wanted: dict[str, tuple[dict[str, Any], str]] = {
        "someone/mistyped": ({}, "no such model on the hub; check the spelling"),
        "someone/secret": ({}, "the hub gives it only to those who asked on the model's page"),
        "someone/other": ({}, "on the hub it has no config.json"),
        "someone/old": ({"revision": "v0"}, "no such revision of it on the hub"),
        "someone/broken": ({}, "the hub cannot be reached (Server error '503"),
    }
    _Hub.asked.clear()
    said = ask(hub, tmp_path, *((repo_id, settings) for repo_id, (settings, _) in wanted.items()))
    for line, (repo_id, (_, message)) in zip(said, wanted.items(), strict=True):
        assert line.startswith(f"{repo_id}: no such folder, and {message}")
        assert "\n" not in line
    assert len(_Hub.asked) == len(wanted)


def test_a_hub_that_is_away_is_not_waited_for(tmp_path: Path) -> None:
    [said] = ask("http://127.0.0.1:9", tmp_path, ("someone/mistyped", {}))
    assert said.startswith("someone/mistyped: no such folder, and the hub cannot be reached (")
    assert said.endswith("once it can")


def test_what_is_no_hub_id_asks_nobody(hub: str, tmp_path: Path) -> None:
    _Hub.asked.clear()
    said = ask(hub, tmp_path, ("a model", {}), ("someone/model", {"local_files_only": True}))
    assert "no hub id either; give a folder" in said[0]
    assert "local_files_only is set" in said[1]
    assert _Hub.asked == []


@pytest.mark.parametrize("text", ["", "{garbage", "\x00", '{"model_type": "mixtral", "hidden_size": "wide"}'])
def test_a_damaged_configuration_is_named(checkpoints: Any, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(checkpoints("mixtral"), tmp_path / "copy")
    (folder / "config.json").write_text(text)
    with pytest.raises(
        monde.CheckpointError, match=r"its config.json cannot be read .*; copy or download it again$"
    ):
        monde.from_pretrained(folder, device="cpu")


def test_an_unknown_architecture_keeps_the_words_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "tomorrow"}')
    with pytest.raises(ValueError, match="tomorrow"):
        read_configuration(tmp_path)


def test_a_folder_in_the_home_directory(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoints("mixtral")
    monkeypatch.setenv("HOME", str(folder.parent))
    model = monde.from_pretrained(f"~/{folder.name}", device="cpu")
    model.monde.close()
