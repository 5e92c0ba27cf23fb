"""What `monde train` is told, as a TOML file: every setting, its default, and what it may be."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelSettings:
    """path: a folder or hub id of transformers; relative folders are seen from the TOML file.
    init "pretrained" goes on from its weights, "random" starts anew.
    """

    path: str
    init: str = "pretrained"


@dataclass(frozen=True)
class DataSettings:
    """text: a UTF-8 file; "" is the text that monde ships."""

    text: str = ""
    sequence_length: int = 128


@dataclass(frozen=True)
class OptimizerSettings:
    """batch: sequences of one step over all ranks. The rate warms up linearly, then falls as a cosine to a tenth."""

    steps: int = 300
    batch: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    aux_weight: float = 0.01
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Of step 0, 1, ..."""
        from math import cos, pi

        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * cos(pi * min(done, 1.0)))


@dataclass(frozen=True)
class ParallelSettings:
    """nodes: how many groups of ranks experts are spread over; 0: one a rank. Ranks of a node share its experts, cut
    along F. chunks: "auto" measures and plans, or [forward, backward].
    timeout_s: when to give up on a rank that does not answer.
    """

    nodes: int = 0
    chunks: Any = "auto"
    timeout_s: float = 60.0


@dataclass(frozen=True)
class OutputSettings:
    """folder: checkpoints, losses.jsonl, loss.png and the trained model; relative to the TOML file."""

    folder: str
    checkpoint_every: int = 50
    keep: int = 2


@dataclass(frozen=True)
class TrainConfig:
    model: ModelSettings
    output: OutputSettings
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)

    def identity(self) -> dict[str, Any]:
        """What a run may not change between its start and a resume."""
        return {name: asdict(getattr(self, name)) for name in ("model", "data", "optimizer")}


_KINDS: dict[str, Any] = {"int": int, "float": (int, float), "str": str}
_TABLES: dict[str, Any] = {
    "model": ModelSettings,
    "output": OutputSettings,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "parallel": ParallelSettings,
}


def read_config(path: Path) -> TrainConfig:
    """Errors: ValueError for what is not TOML, unknown, of the wrong type or out of range, by name."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); name a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    unknown = [name for name in data if name not in _TABLES]
    if unknown:
        raise ValueError(f"{path}: table [{unknown[0]}] is unknown; expected {', '.join(_TABLES)}")
    tables = {
        name: _table(path, name, settings, data[name]) for name, settings in _TABLES.items() if name in data
    }
    for name in ("model", "output"):
        if name not in tables:
            raise ValueError(f"{path}: table [{name}] is missing; see docs/training.md for an example")
    config = TrainConfig(**tables)
    _check(path, config)
    return config


def _table(path: Path, name: str, settings: Any, data: Any) -> Any:
    known = {f.name: f for f in fields(settings)}
    if not isinstance(data, dict):
        raise ValueError(f"{path}: {name} must be a table, as in [{name}]")
    for key, value in data.items():
        if key not in known:
            raise ValueError(f"{path}: {name}.{key} is unknown; expected {', '.join(known)}")
        kind = known[key].type
        allowed = _KINDS.get(str(kind))
        if allowed and (not isinstance(value, allowed) or isinstance(value, bool)):
            raise ValueError(f"{path}: {name}.{key}: expected {kind}, got {value!r}")
    missing = [k for k, f in known.items() if k not in data and k in ("path", "folder")]
    if missing:
        raise ValueError(f"{path}: {name}.{missing[0]} is missing")
    return settings(**data)


def _check(path: Path, config: TrainConfig) -> None:
    optimizer, parallel = config.optimizer, config.parallel
    chunks = parallel.chunks
    is_pair = (
        isinstance(chunks, list) and len(chunks) == 2 and all(isinstance(c, int) and c >= 1 for c in chunks)
    )
    wrong = {
        'model.init must be "pretrained" or "random"': config.model.init not in ("pretrained", "random"),
        "data.sequence_length must be at least 2": config.data.sequence_length < 2,
        "optimizer.steps and batch must be at least 1": min(optimizer.steps, optimizer.batch) < 1,
        "optimizer.learning_rate must be above 0": not optimizer.learning_rate > 0,
        "optimizer.warmup_steps, weight_decay and aux_weight must be at least 0": min(
            optimizer.warmup_steps, optimizer.weight_decay, optimizer.aux_weight
        )
        < 0,
        "optimizer.max_grad_norm must be above 0": not optimizer.max_grad_norm > 0,
        "output.checkpoint_every and keep must be at least 1": min(
            config.output.checkpoint_every, config.output.keep
        )
        < 1,
        "parallel.nodes must be at least 0": parallel.nodes < 0,
        "parallel.timeout_s must be above 0": not parallel.timeout_s > 0,
        'parallel.chunks must be "auto" or [forward, backward], both at least 1': chunks != "auto"
        and not is_pair,
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{path}: {what}")
