"""What a user may ask for: sizes, devices, backends. Parsed and validated here, and nowhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers.utils.quantization_config import QuantizationConfigMixin

from hostcompute.topology import machine_memory_bytes
from monde.sizes import format_bytes, parse_size_bytes

QUANT_METHOD = "monde"
CPU_BACKENDS = ("auto", "native", "numba", "reference")
MOVING = ("dynamic", "lru")
RESIDENCIES = (*MOVING, "static", "uniform")
SPLIT_POLICY_NAMES = ("best", "monde-rule", "fiddler", "two-ended", "all-host", "all-fetch")
PARALLELS = ("sharded", "peers", "auto")

Size = int | str | None


@dataclass(frozen=True)
class MemoryBudget:
    """Upper limits in bytes, never exceeded. None: what the machine has free when loading starts."""

    gpu_bytes: int | None
    host_bytes: int | None

    def explain(self) -> str:
        gpu = "free GPU memory" if self.gpu_bytes is None else format_bytes(self.gpu_bytes)
        host = "free host memory" if self.host_bytes is None else format_bytes(self.host_bytes)
        return f"GPU: {gpu}; host: {host}"


class MondeConfig(QuantizationConfigMixin):
    """How to run a mixture-of-experts model; also the `quantization_config` of `from_pretrained`.

    gpu_memory, host_memory: "16GiB", "500MB" or bytes. gpu_memory covers dense weights, KV cache, workspace
        and resident experts; host_memory the experts on the host. Default: what is free when loading starts.
        Over ranks both are of each rank.
    max_memory: accelerate's form of the same, {0: "10GiB", "cpu": "56GiB"}; give one form or the other.
    device: where the dense weights run, "cuda:0" or "cpu", or such a torch.device; default the first GPU, else the
        CPU. On "cpu" a gpu_memory above 0 makes the CPU a stand-in for the GPU: resident experts take its code path.
    cpu_backend: "auto" (native, else numba), "native", "numba" or "reference".
    num_threads: threads of the host kernels; default all physical cores.
    nllb_upstream_routing: NLLB-MoE as transformers runs it, on experts 0 and 1 alone; default is the routing
        that its router asks for.
    residency: who has a slot on the GPU. "dynamic", the default, follows the routing while the model runs, for which
        host_memory must hold the residents too, else it is static; "lru" does so too, but every step, for those used
        last; "static" keeps what it starts with; "uniform" as well, with slots spread evenly over the layers.
    heat_file: written by Engine.save_heat: the hottest experts start resident. Default: the first ones of every layer,
        as many as save most time if all are equally popular.
    split_policy: how a prompt's experts are split between GPU, bus and host: "best", the default, exactly by costs;
        others are for comparison, "monde-rule", "fiddler", "two-ended" (HybriMoE's queue), "all-host", "all-fetch".
    mesh: a 1-D DeviceMesh, of torchrun's processes for example: its ranks hold the experts together. Each runs the
        dense part of the model on inputs of its own, or on the same ones; every rank must call the model equally
        often, which generate sees to. mesh["name"] is one dimension of a larger mesh.
    parallel: "sharded", the default, cuts every expert along F over the ranks; "peers" spreads whole experts; "auto"
        holds both and chooses per batch by measured costs, at twice the memory for experts.
    mesh_shares: how much of every expert each rank holds, where devices are unequal; by default equally much.
    mesh_timeout_s: how long a rank waits for the others before it gives up with an error.
    deferred_experts: of a token's experts in a decode step, how many of smallest routing weight are added one MoE layer
        later, where the host can compute them during attention. Changes the answer: docs/deferral.md has by how much.
        0, the default, is exact.
    max_context, max_batch: the longest sequence and largest batch that the budget must leave room for. What counts is
        their product; a model that is asked for more warns once, and may then exceed its budget.

    Errors: ValueError with the remedy for sizes that cannot be read, are negative or exceed the machine.
    """

    def __init__(
        self,
        gpu_memory: Size = None,
        host_memory: Size = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        device: str | torch.device | None = None,
        cpu_backend: str = "auto",
        num_threads: int | None = None,
        max_context: int = 4096,
        max_batch: int = 1,
        nllb_upstream_routing: bool = False,
        residency: str = "dynamic",
        heat_file: str | Path | None = None,
        split_policy: str = "best",
        mesh: Any = None,
        parallel: str = "sharded",
        mesh_shares: Sequence[float] | None = None,
        mesh_timeout_s: float = 300.0,
        deferred_experts: int = 0,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        if max_memory is not None:
            gpu_memory, host_memory = _from_max_memory(max_memory, gpu_memory, host_memory)
        self.gpu_memory = None if gpu_memory is None else parse_size_bytes(gpu_memory, "gpu_memory")
        self.host_memory = None if host_memory is None else parse_size_bytes(host_memory, "host_memory")
        if self.host_memory is not None and self.host_memory > machine_memory_bytes():
            wanted, have = format_bytes(self.host_memory), format_bytes(machine_memory_bytes())
            raise ValueError(f"host_memory: {wanted} is more than this machine's {have}; ask for less")
        self.device = None if device is None else _device_name(device)
        if cpu_backend not in CPU_BACKENDS:
            raise ValueError(f"cpu_backend: expected one of {', '.join(CPU_BACKENDS)}, got {cpu_backend!r}")
        self.cpu_backend = cpu_backend
        if residency not in RESIDENCIES:
            raise ValueError(f"residency: expected one of {', '.join(RESIDENCIES)}, got {residency!r}")
        self.residency = residency
        self.heat_file = None if heat_file is None else str(heat_file)
        if split_policy not in SPLIT_POLICY_NAMES:
            raise ValueError(
                f"split_policy: expected one of {', '.join(SPLIT_POLICY_NAMES)}, got {split_policy!r}"
            )
        self.split_policy = split_policy
        self.num_threads = _positive("num_threads", num_threads) if num_threads is not None else None
        self.mesh = None if mesh is None else _one_dim(mesh)
        if parallel not in PARALLELS:
            raise ValueError(f"parallel: expected one of {', '.join(PARALLELS)}, got {parallel!r}")
        self.parallel = parallel
        self.mesh_shares = None if mesh_shares is None else _shares(mesh, mesh_shares)
        if not mesh_timeout_s > 0:
            raise ValueError(f"mesh_timeout_s: expected seconds above 0, got {mesh_timeout_s!r}")
        self.mesh_timeout_s = float(mesh_timeout_s)
        if mesh is None and parallel != "sharded":
            raise ValueError(
                f"parallel: {parallel} needs ranks; give mesh=, or start monde with torchrun, as in docs/sharding.md"
            )
        if self.heat_file is not None and parallel != "sharded":
            raise ValueError(
                f'heat_file: ranks with parallel="{parallel}" hold other experts than it names; leave it'
            )
        if type(deferred_experts) is not int or deferred_experts < 0:
            raise ValueError(
                f"deferred_experts: expected a whole number from 0 up, below the experts per token, got {deferred_experts!r}"
            )
        if deferred_experts and mesh is not None:
            raise ValueError(
                "deferred_experts: experts over ranks are never deferred; leave it 0, or mesh out"
            )
        self.deferred_experts = deferred_experts
        self.max_context = _positive("max_context", max_context)
        self.max_batch = _positive("max_batch", max_batch)
        self.nllb_upstream_routing = nllb_upstream_routing

    @property
    def budget(self) -> MemoryBudget:
        return MemoryBudget(self.gpu_memory, self.host_memory)

    def slot_settings(self) -> list[str]:
        """What was asked for that says who has a slot on the GPU, or what goes there: nothing to a host alone."""
        defaults = {"residency": "dynamic", "heat_file": None, "split_policy": "best"}
        chosen = {name: getattr(self, name) for name in defaults}
        return [f"{name} {value}" for name, value in chosen.items() if value != defaults[name]]

    def explain(self) -> str:
        """One line for logs."""
        return f"device {self.device or 'auto'}; {self.budget.explain()}; host backend {self.cpu_backend}"

    def to_dict(self) -> dict[str, Any]:
        """What can be written down: of the mesh, its description."""
        return self.__dict__ | {"mesh": None if self.mesh is None else str(self.mesh)}

    def __deepcopy__(self, memo: dict[int, Any]) -> MondeConfig:
        """transformers copies configurations; a mesh cannot be, and none of this changes."""
        return self


def _from_max_memory(max_memory: Mapping[int | str, int | str], gpu: Size, host: Size) -> tuple[Size, Size]:
    if gpu is not None or host is not None:
        raise ValueError("max_memory: give either max_memory or gpu_memory and host_memory, not both")
    unknown = [key for key in max_memory if key not in (0, "0", "cpu")]
    if unknown:
        raise ValueError(f'max_memory: expected the keys 0 (the GPU) and "cpu", got {unknown}')
    return max_memory.get(0, max_memory.get("0")), max_memory.get("cpu")


def _device_name(device: str | torch.device) -> str:
    """As text, for configurations are written as JSON. Whether the machine has it is asked when loading starts."""
    named = device
    if isinstance(named, str):
        with contextlib.suppress(RuntimeError):
            named = torch.device(named)
    if isinstance(named, torch.device):
        if named.type == "cuda":
            return str(named)
        if named.type == "cpu" and not named.index:
            return "cpu"
    raise ValueError(f'device: expected "cpu", "cuda" or a GPU as "cuda:0", got {device!r}')


def _one_dim(mesh: Any) -> DeviceMesh:
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(
            'mesh: expected a DeviceMesh, as torch.distributed.device_mesh.init_device_mesh("cpu", (2,)) makes under '
            f"torchrun, got {mesh!r}"
        )
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        first = f'mesh["{names[-1]}"]' if names else "one with mesh_dim_names, and of that mesh[name]"
        raise ValueError(f"mesh: expected one dimension, got shape {tuple(mesh.shape)}; give {first}")
    if mesh.device_type not in ("cpu", "cuda"):
        raise ValueError(f"mesh: expected a mesh of cpu or cuda, got {mesh.device_type}")
    if mesh.get_coordinate() is None:
        raise ValueError("mesh: this process is none of its ranks; load the model on those alone")
    return mesh


def _shares(mesh: DeviceMesh | None, shares: Sequence[float]) -> tuple[float, ...]:
    if mesh is None:
        raise ValueError("mesh_shares: there are no ranks to share; give mesh= too")
    numbers = tuple(float(share) for share in shares)
    if len(numbers) != mesh.size() or not all(0 < share < float("inf") for share in numbers):
        raise ValueError(
            f"mesh_shares: expected {mesh.size()} numbers above 0, one for each rank, got {list(shares)}"
        )
    return numbers


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return value
