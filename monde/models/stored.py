"""What a checkpoint holds, from the headers of its files, or from its index alone: no weight is read."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from monde.models.experts import ExpertsModule
from monde.models.sources import uses_of
from monde.weights.checkpoint import CheckpointError, TensorEntry, read_header

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredSizes:
    """Bytes on disk. unused_bytes: of tensors that the model does not load."""

    num_files: int
    dense_bytes: int
    expert_bytes: int
    unused_bytes: int


@dataclass(frozen=True)
class Index:
    """A model.safetensors.index.json whose files are elsewhere. total_bytes: of all tensors, None if it does not say."""

    folder: str
    num_files: int
    keys: tuple[str, ...]
    total_bytes: int | None

    def dtype(self, num_weights: int) -> torch.dtype | None:
        """The type that so many weights are in, from the bytes of all; None where the index does not tell those.

        fp16 is as long as bf16, which is taken. Tensors that the model does not load may count up to two fifths.
        Errors: CheckpointError for lengths of no type that can be run.
        """
        if self.total_bytes is None:
            return None
        weight_bytes = self.total_bytes / num_weights
        for dtype in (torch.bfloat16, torch.float32):
            if dtype.itemsize * 0.9 <= weight_bytes <= dtype.itemsize * 1.4:
                return dtype
        raise CheckpointError(
            f"{self.folder}: its index tells of {weight_bytes:.3g} bytes a weight, which is neither fp32 nor bf16; name "
            "the dtype in config.json, and use the config and the index of one model"
        )

    def check(self, model: Any, modules: Sequence[ExpertsModule]) -> None:
        """Errors: CheckpointError where no tensor is named for some experts of `model`, of any device."""
        named = Counter(param for use in uses_of(model, self.keys) for param in use.params)
        tied = model.all_tied_weights_keys
        missing = [
            full_name
            for module in modules
            for full_name in map(module.full_name, module.param_names())
            if full_name not in named and tied.get(full_name) not in named
        ]
        if missing:
            raise CheckpointError(
                f"{self.folder}: its index names no tensor for {missing[0]}, which config.json describes; use the config "
                "and the index of one model"
            )
        for module in modules:
            for full_name in map(module.full_name, module.param_names()):
                # Stored as one tensor, or as one or more for every expert.
                if named[full_name] > 1 and named[full_name] % module.spec.num_experts:
                    raise CheckpointError(
                        f"{self.folder}: its index names {named[full_name]} tensors for the {module.spec.num_experts} "
                        f"experts of {full_name}; use the config and the index of one model"
                    )


def checkpoint_index(path_or_id: str) -> Index | None:
    """The index of a folder, or of a hub id in the local cache. Errors: CheckpointError where it is damaged."""
    file = _here(path_or_id, "model.safetensors.index.json")
    if file is None:
        return None
    shards = _shards(file)
    record = json.loads(file.read_text())
    metadata = record.get("metadata")
    total_bytes = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = int(total_bytes) if isinstance(total_bytes, int | float) and total_bytes > 0 else None
    return Index(file.parent.name, len(shards), tuple(record["weight_map"]), size)


def checkpoint_files(path_or_id: str) -> list[Path]:
    """All safetensors files of a folder, or of a hub id in the local cache; none where one is missing.

    Errors: CheckpointError for an index that is damaged.
    """
    index = _here(path_or_id, "model.safetensors.index.json")
    names = ["model.safetensors"] if index is None else _shards(index)
    files = [file for file in (_here(path_or_id, name) for name in names) if file is not None]
    return files if len(files) == len(names) else []


def stored_dtype(files: Sequence[Path]) -> torch.dtype | None:
    """The type of the first floating-point tensor, which loading takes where config.json names none."""
    entries = (entry for file in files for entry in read_header(file, may_end=True).values())
    return next((_FLOATS[entry.dtype] for entry in entries if entry.dtype in _FLOATS), None)


def stored_sizes(model: Any, modules: Sequence[ExpertsModule], files: Sequence[Path]) -> StoredSizes:
    """Split the bytes of `files` as loading `model`, of any device, would.

    Errors: CheckpointError for damaged files, and when the files hold fewer expert weights than the model has.
    """
    entries: dict[str, TensorEntry] = {}
    for file in files:
        entries.update(read_header(file, may_end=True))
    experts = {name for module in modules for name in module.all_full_names()}
    own = model.state_dict().keys()
    dense_bytes = expert_bytes = unused_bytes = num_weights = 0
    for use in uses_of(model, entries):
        entry = entries[use.key]
        num_bytes = entry.end - entry.start
        if experts.intersection(use.params):
            expert_bytes += num_bytes
            num_weights += math.prod(entry.shape)
        elif own & set(use.params):
            dense_bytes += num_bytes
        else:
            unused_bytes += num_bytes
    # Not the parameters' sizes: those may have rows for experts that compute nothing and are stored nowhere.
    wanted = sum(m.spec.num_experts * m.spec.num_matrices * m.spec.d_model * m.spec.d_ffn for m in modules)
    if num_weights < wanted:
        raise CheckpointError(
            f"{files[0].parent.name}: its files hold {num_weights} expert weights, config.json describes {wanted}; "
            "use the config and all shards of one model"
        )
    return StoredSizes(len(files), dense_bytes, expert_bytes, unused_bytes)


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: the file is damaged; download or copy it again") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index}: its weight_map names no files; download or copy it again")
    return sorted(names)


def _here(path_or_id: str, name: str) -> Path | None:
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = try_to_load_from_cache(path_or_id, name)
    return Path(found) if isinstance(found, str) else None
