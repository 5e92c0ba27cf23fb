"""Tensors of a safetensors checkpoint as views of mapped files: nothing is read before it is used.

The files are mapped here, not through safetensors, so that pages can be given back while loading goes on;
else the mapping alone would make the process appear as large as the checkpoint.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADER_LIMIT_BYTES = 100 * 2**20  # what safetensors itself accepts


class CheckpointError(ValueError):
    """The checkpoint cannot be used; the message names the file or tensor and the remedy."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. `start` and `end` are bytes from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def is_within(self, first: int, last: int) -> bool:
        """Whether it lies there and, of a type that is read, has the size that its shape says."""
        num_bytes = self.end - self.start
        if self.dtype in _DTYPES and num_bytes != math.prod(self.shape) * _DTYPES[self.dtype].itemsize:
            return False
        return first <= self.start <= self.end <= last


class Checkpoint:
    """All tensors of some safetensors files. Headers are read and checked at once, data on demand."""

    def __init__(self, files: Iterable[str | Path]) -> None:
        self.entries: dict[str, TensorEntry] = {}
        for file in map(Path, files):
            self.entries.update(read_header(file))
        self._maps: dict[Path, mmap.mmap] = {}

    def tensor(self, key: str) -> Tensor:
        """A view of the mapped file; valid until `close`.

        Errors: CheckpointError for element types not supported.
        """
        entry = self.entries[key]
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{entry.file.name}: {key} is stored as {entry.dtype}; monde reads experts in F32, F16 and "
                "BF16; load a checkpoint in one of these that is not quantised"
            )
        mapped = self._maps.get(entry.file)
        if mapped is None:
            with entry.file.open("rb") as stream:
                # A private mapping: torch wants writable memory, and no write could reach the file.
                mapped = self._maps[entry.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype, count = _DTYPES[entry.dtype], math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def drop_pages(self) -> None:
        """Give back the memory of everything read so far; the views stay valid and read again."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Forget the mappings; the system unmaps each once its last view is gone."""
        self._maps.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_header(file: Path, may_end: bool = False) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. may_end: it may hold its header and nothing else, which is enough to plan.

    Errors: CheckpointError for other formats and for damaged files.
    """
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{file.name}: monde streams experts from safetensors files only; convert the checkpoint once "
            "with AutoModel.from_pretrained(...).save_pretrained(...)"
        )
    try:
        with file.open("rb") as stream:
            size_bytes, header_bytes = file.stat().st_size, int.from_bytes(stream.read(8), "little")
            if size_bytes < 8 or header_bytes > min(size_bytes - 8, _HEADER_LIMIT_BYTES):
                raise _damaged(file)
            header = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror}); copy or download all files of the checkpoint"
        ) from error
    try:
        entries = dict(_entries(file, json.loads(header), 8 + header_bytes))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file) from error
    last = max((entry.end for entry in entries.values()), default=0)
    if may_end and size_bytes == 8 + header_bytes:
        size_bytes = last
    if not all(entry.is_within(8 + header_bytes, size_bytes) for entry in entries.values()):
        raise _damaged(file)
    return entries


def _entries(file: Path, header: dict[str, Any], base: int) -> Iterator[tuple[str, TensorEntry]]:
    for key, info in header.items():
        if key != "__metadata__":
            start, end = info["data_offsets"]
            yield key, TensorEntry(file, info["dtype"], tuple(info["shape"]), base + start, base + end)


def _damaged(file: Path) -> CheckpointError:
    return CheckpointError(f"{file}: the file is truncated or damaged; download or copy it again")
