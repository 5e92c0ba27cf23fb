"""The configuration of a model folder or hub id: read in this one place, with one line for all that can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig

from monde.weights.checkpoint import CheckpointError

HUB_SETTINGS = ("revision", "token", "cache_dir", "trust_remote_code", "subfolder", "local_files_only")
_FILE = "config.json"
_GIVE = f"give a folder with {_FILE}, or a hub id such as Qwen/Qwen3-30B-A3B"
# The first kind that an error is says why the hub did not help; {error} is its first line.
_WHY_NOT: dict[type[Exception], str] = {
    HFValidationError: f"no hub id either; {_GIVE}",
    GatedRepoError: "the hub gives it only to those who asked on the model's page; do so, then `hf auth login`",
    RepositoryNotFoundError: "no such model on the hub; check the spelling, or `hf auth login` if it is private",
    RevisionNotFoundError: "no such revision of it on the hub; check revision",
    EntryNotFoundError: f"on the hub it has no {_FILE}; {_GIVE}",
    Exception: f"the hub cannot be reached ({{error}}); {_GIVE} once it can",
}


def read_configuration(path_or_id: str | Path, **hub: Any) -> Any:
    """The PretrainedConfig of a model. hub: those of HUB_SETTINGS, as from_pretrained takes them.

    Errors: FileNotFoundError where neither a folder, the local cache nor the hub has it; CheckpointError for a
    config.json that is damaged; ValueError, in transformers' words, for a model that it does not know.
    """
    name = str(path_or_id)
    folder = Path(name)
    if not name:
        raise FileNotFoundError(f"the model's name is empty; {_GIVE}")
    if folder.is_dir():
        if not (folder / (hub.get("subfolder") or "") / _FILE).is_file():
            raise FileNotFoundError(
                f"{name} holds no {_FILE}; give a folder written by save_pretrained, or a hub id"
            )
    elif folder.exists():
        raise FileNotFoundError(f"{name} is a file; give the folder that holds {_FILE}, or a hub id")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder; {_GIVE}")
    else:
        _ask_hub(name, **hub)
    try:
        return AutoConfig.from_pretrained(path_or_id, **hub)
    except ValueError:
        raise
    except Exception as error:  # whatever a field of the wrong type led to
        raise CheckpointError(
            f"{name}: its {_FILE} cannot be read ({_first_line(error)}); copy or download it again"
        ) from error


def refuse_quantised(path_or_id: str | Path, model_config: Any) -> None:
    """Errors: ValueError where the checkpoint's experts are stored in a format that the kernels do not have."""
    quantised = getattr(model_config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ValueError(
            f"{path_or_id} is quantised ({method}); monde runs bf16, fp16 and fp32 checkpoints; load one"
        )


def _ask_hub(
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
    **others: Any,
) -> None:
    """One question, without the retries of a download: with them a mistyped id waits for minutes.

    Errors: FileNotFoundError where neither the cache nor the hub has the configuration.
    """
    file = f"{subfolder}/{_FILE}" if subfolder else _FILE
    try:
        if isinstance(try_to_load_from_cache(repo_id, file, cache_dir=cache_dir, revision=revision), str):
            return
        if local_files_only:
            raise ConnectionError("local_files_only is set, and the cache does not have it")
        get_hf_file_metadata(hf_hub_url(repo_id, file, revision=revision), token=token)
    except (HFValidationError, EntryNotFoundError, httpx.HTTPError, ConnectionError) as error:
        why_not = next(words for kind, words in _WHY_NOT.items() if isinstance(error, kind))
        raise FileNotFoundError(
            f"{repo_id}: no such folder, and {why_not.format(error=_first_line(error))}"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
