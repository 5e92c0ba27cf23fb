"""What one machine can do, measured or described: the numbers that every plan is made of.

E experts, F expert hidden dim. Speeds are bytes or floating point operations per second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from monde.planning.fit import AlphaBeta

PROFILE_VERSION = 6
_AT_THE_ROOF = 0.1  # measured rates this close to the memory's are taken for limited by it


@dataclass(frozen=True)
class Curve:
    """y over x at measured points: linear in log x between them, constant outside."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.y):
            raise ValueError(f"Curve: expected as many x as y, at least one, got {self.x} and {self.y}")
        if (
            self.x[0] <= 0
            or any(b <= a for a, b in zip(self.x, self.x[1:], strict=False))
            or min(self.y) <= 0
        ):
            raise ValueError(f"Curve: expected rising x and values above 0, got {self.x} and {self.y}")

    def at(self, x: ArrayLike) -> NDArray[np.float64]:
        clipped = np.maximum(x, self.x[0])
        return np.asarray(np.interp(np.log(clipped), self._log_x, self.y), np.float64)

    @cached_property
    def _log_x(self) -> NDArray[np.float64]:
        return np.log(np.asarray(self.x, np.float64))


@dataclass(frozen=True)
class ExpertRate:
    """How one processor computes an expert: overhead_s + max(bytes / bytes_per_s, flops / flops_per_s(tokens))."""

    overhead_s: float
    bytes_per_s: float
    flops_per_s: Curve  # over tokens of the expert

    def __post_init__(self) -> None:
        if not (self.overhead_s >= 0 and self.bytes_per_s > 0):
            raise ValueError(
                f"ExpertRate: expected overhead_s >= 0 and bytes_per_s > 0, got {self.overhead_s}, {self.bytes_per_s}"
            )

    @classmethod
    def from_table(
        cls, tokens: tuple[int, ...], seconds: tuple[float, ...], expert_bytes: float, flops_per_token: float
    ) -> ExpertRate:
        """The rate that gives back `seconds` at every measured number of tokens, exactly.

        Its overhead is 0: a table of one expert size cannot tell overhead from bytes.
        """
        flops = tuple(t * flops_per_token / s for t, s in zip(tokens, seconds, strict=True))
        return cls(0.0, expert_bytes / min(seconds), Curve(tuple(map(float, tokens)), flops))

    def with_memory(self, factor: float) -> ExpertRate:
        """The rate if memory were `factor` times as fast and arithmetic the same.

        A table's flops_per_s holds the time of reading too where that was the limit: in bf16, one operation per
        byte and token. Those points rise as well, up to the greatest that was measured.
        """
        curve = self.flops_per_s
        top = max(curve.y)
        flops = tuple(
            min(y * factor, top) if abs(y / (t * self.bytes_per_s) - 1) <= _AT_THE_ROOF else y
            for t, y in zip(curve.x, curve.y, strict=True)
        )
        return ExpertRate(self.overhead_s, self.bytes_per_s * factor, Curve(curve.x, flops))


@dataclass(frozen=True)
class Overlap:
    """Two activities at once: how many times longer each takes while the other runs.

    first, second >= 1 and 1/first + 1/second >= 1: together they do not lose to one after the other.
    """

    first: float = 1.0
    second: float = 1.0

    def __post_init__(self) -> None:
        if not (self.first >= 1 and self.second >= 1 and 1 / self.first + 1 / self.second >= 1 - 1e-9):
            raise ValueError(
                f"Overlap: expected factors >= 1 with 1/first + 1/second >= 1, got {self.first}, {self.second}; "
                "measure again on an idle machine"
            )

    def of_share(self, share: float) -> Overlap:
        """Where they meet in only so much of their time."""
        return Overlap(1 + (self.first - 1) * share, 1 + (self.second - 1) * share)


# 55.4 GB/s one way, 50.6 each way at once: PCIe 5.0 x16, pinned, on the machine of `h200`.
_BOTH_WAYS = Overlap(55.4 / 50.6, 55.4 / 50.6)


@dataclass(frozen=True)
class PromptLaunches:
    """What Python takes in a MoE layer of a long prompt.

    plan_s: before anything of the layer can start. layer_s: before the products, while bus and host work. What holds a
    side up besides, before it begins and after it ends: host_s the host, where it takes part, fetch_s the bus.
    resident_s: all of it where nothing is planned, because every expert of the layer has a slot.
    """

    plan_s: float
    layer_s: float
    host_s: float
    fetch_s: float
    resident_s: float

    @classmethod
    def none(cls) -> PromptLaunches:
        return cls(0.0, 0.0, 0.0, 0.0, 0.0)

    def faster(self, factor: float) -> PromptLaunches:
        return PromptLaunches(*(seconds / factor for seconds in astuple(self)))


@dataclass(frozen=True)
class GpuProfile:
    """The GPU and its bus. All AlphaBeta are over bytes.

    zero_copy_bytes_per_s: kernels reading pinned host memory. round_trip: activations of one layer to the host and
    back, over the bytes of one way. host_while_copying slows (host, copy), gpu_while_copying (GPU, copy).
    up_while_down slows copies (to the GPU, from it); calibration does not time it.
    block_overhead_s: a block's small dense kernels in a captured step, beside the bytes they read.
    decode_layer_s: a MoE layer's own kernels in a captured step, beside its experts; the round trip holds it too.
    prompt: of a MoE layer of a long prompt, beside its experts.
    """

    memory_bytes: int
    expert: ExpertRate
    h2d: AlphaBeta
    d2h: AlphaBeta
    zero_copy_bytes_per_s: float
    round_trip: AlphaBeta
    host_while_copying: Overlap
    gpu_while_copying: Overlap
    block_overhead_s: float
    decode_layer_s: float
    prompt: PromptLaunches
    up_while_down: Overlap = _BOTH_WAYS


@dataclass(frozen=True)
class MachineIdentity:
    """What a profile is valid for."""

    name: str
    cpu: str
    num_cores: int
    gpu: str | None
    library_version: str  # "" in described machines: no kernel of ours ran there


@dataclass(frozen=True)
class MemoryChannels:
    """The host memory's channels and the nominal bandwidth of one."""

    num_channels: int
    channel_bytes_per_s: float

    def __post_init__(self) -> None:
        if not (self.num_channels >= 1 and self.channel_bytes_per_s > 0):
            raise ValueError(
                f"MemoryChannels: expected at least one channel with a bandwidth above 0, got {self}"
            )


@dataclass(frozen=True)
class Noise:
    """A measurement whose two halves, taken one after the other, disagree: their medians in seconds."""

    what: str
    first_s: float
    second_s: float

    @property
    def share(self) -> float:
        """By how much the slower half is above the quicker one."""
        return max(self.first_s, self.second_s) / min(self.first_s, self.second_s) - 1

    def __str__(self) -> str:
        return f"{self.what}: {self.first_s:.3g} s, then {self.second_s:.3g} s ({self.share:.0%} apart)"


@dataclass(frozen=True)
class PoorFit:
    """Seconds that vary, and not with the size: a line through them says nothing. r2, spread: as in AlphaBeta."""

    what: str
    r2: float
    spread: float

    def __str__(self) -> str:
        return f"{self.what}: r2 {self.r2:.2f} over sizes, seconds {self.spread:.0%} around their mean"


@dataclass(frozen=True)
class HardwareProfile:
    """One machine. gpu is None where there is none; source says what was measured and what is assumed.

    host_read: bytes per second over threads. host_expert: all threads on one expert after the other, in bf16;
    host_formats: in other formats, by name. A format that is not there is taken to differ by its bytes alone.
    host_call_s: a call of the host's kernels from Python beside its experts; the GPU's round trip holds its own.
    eager_block_s: one block without experts as Python runs it, kernel by kernel, beside what the kernels take.
    step_s: a decode step beside its blocks: Python around them, and the next token chosen and brought to the host.
    memory_channels: None where nobody knows them. noisy: what not to trust, accepted by whoever measured.
    """

    machine: MachineIdentity
    source: str
    memory_bytes: int
    host_read: Curve
    host_expert: ExpertRate
    gpu: GpuProfile | None
    host_call_s: float
    eager_block_s: float
    step_s: float
    memory_channels: MemoryChannels | None = None
    noisy: tuple[Noise | PoorFit, ...] = ()
    host_formats: Mapping[str, ExpertRate] = field(default_factory=dict)

    def host_rate(self, format_name: str) -> ExpertRate:
        return self.host_formats.get(format_name, self.host_expert)

    def with_host(self, change: Callable[[ExpertRate], ExpertRate]) -> HardwareProfile:
        """The machine with every format's rate on the host changed."""
        formats = {name: change(rate) for name, rate in self.host_formats.items()}
        return replace(self, host_expert=change(self.host_expert), host_formats=formats)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({"version": PROFILE_VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, machine: MachineIdentity | None = None) -> HardwareProfile:
        """Errors: ValueError when the file is no profile, of another version, or not of `machine`."""
        try:
            data = json.loads(Path(path).read_text())
            version = data.pop("version")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: not a hardware profile; run `monde calibrate` again") from error
        if version != PROFILE_VERSION:
            raise ValueError(
                f"{path}: profile version {version}, expected {PROFILE_VERSION}; run `monde calibrate` again"
            )
        try:
            profile = _profile(data)
            _check_numbers(profile)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: damaged hardware profile ({error}); run `monde calibrate` again"
            ) from error
        if machine is not None and machine != profile.machine:
            raise ValueError(
                f"{path}: measured on {profile.machine}, this is {machine}; run `monde calibrate` again"
            )
        return profile


_SIGNED = "r2"  # the one number that may be below zero


def _check_numbers(record: Any, name: str = "profile") -> None:
    """That every number is one, finite and not negative. Errors: TypeError naming the field."""
    if is_dataclass(record):
        kinds = {field.name: str(field.type) for field in fields(record)}
        for field_name, kind in kinds.items():
            value = getattr(record, field_name)
            if kind in ("int", "float"):
                is_number = (
                    isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                )
                if not is_number or (value < 0 and field_name != _SIGNED):
                    raise TypeError(f"{field_name} of {name} is {value!r}")
            elif kind.startswith("tuple[float") and not all(
                isinstance(v, int | float) and 0 <= v < math.inf for v in value
            ):
                raise TypeError(f"{field_name} of {name} is {value!r}")
            else:
                _check_numbers(value, field_name)
    elif isinstance(record, Mapping):
        for key, value in record.items():
            _check_numbers(value, str(key))
    elif isinstance(record, tuple):
        for value in record:
            _check_numbers(value, name)


def _profile(data: dict[str, Any]) -> HardwareProfile:
    gpu, channels = data.pop("gpu"), data.pop("memory_channels")
    return HardwareProfile(
        machine=MachineIdentity(**data.pop("machine")),
        host_read=_curve(data.pop("host_read")),
        host_expert=_rate(data.pop("host_expert")),
        gpu=None if gpu is None else _gpu(gpu),
        memory_channels=None if channels is None else MemoryChannels(**channels),
        noisy=tuple(PoorFit(**n) if "r2" in n else Noise(**n) for n in data.pop("noisy")),
        host_formats={name: _rate(rate) for name, rate in data.pop("host_formats").items()},
        **data,
    )


def _gpu(data: dict[str, Any]) -> GpuProfile:
    return GpuProfile(
        memory_bytes=data["memory_bytes"],
        expert=_rate(data["expert"]),
        h2d=AlphaBeta(**data["h2d"]),
        d2h=AlphaBeta(**data["d2h"]),
        zero_copy_bytes_per_s=data["zero_copy_bytes_per_s"],
        round_trip=AlphaBeta(**data["round_trip"]),
        host_while_copying=Overlap(**data["host_while_copying"]),
        gpu_while_copying=Overlap(**data["gpu_while_copying"]),
        block_overhead_s=data["block_overhead_s"],
        decode_layer_s=data["decode_layer_s"],
        prompt=PromptLaunches(**data["prompt"]),
        up_while_down=Overlap(**data.get("up_while_down", asdict(_BOTH_WAYS))),
    )


def _curve(data: dict[str, Any]) -> Curve:
    return Curve(tuple(data["x"]), tuple(data["y"]))


def _rate(data: dict[str, Any]) -> ExpertRate:
    return ExpertRate(data["overhead_s"], data["bytes_per_s"], _curve(data["flops_per_s"]))
