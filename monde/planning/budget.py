"""Will it fit? Pure arithmetic over sizes, done before anything is loaded.

dense weights + KV cache + workspace + slots of resident experts <= gpu_memory
experts on the host + staging                                    <= host_memory
"""

from __future__ import annotations

from dataclasses import dataclass

from monde.sizes import format_bytes as text


class BudgetError(ValueError):
    """The budget cannot be met. `smallest_bytes` is the least that would work."""

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


@dataclass(frozen=True)
class LayerSize:
    """One MoE layer: its number of experts, the bytes of one, and those of a slot, which pads an expert."""

    num_experts: int
    expert_bytes: int
    slot_bytes: int


@dataclass(frozen=True)
class ModelSize:
    """Everything the arithmetic needs to know about a model and its use.

    num_tokens is the longest sequence times the largest batch; kv_bytes_per_token sums all attention layers;
    act_bytes_per_token is the peak of live activations; logits_bytes those of the last positions;
    library_bytes what matrix libraries and captured steps keep on the GPU for themselves.
    """

    dense_bytes: int
    kv_bytes_per_token: int
    act_bytes_per_token: int
    logits_bytes: int
    staging_bytes_per_token: int
    num_tokens: int
    layers: tuple[LayerSize, ...]
    library_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        return self.num_tokens * self.kv_bytes_per_token

    @property
    def workspace_bytes(self) -> int:
        return self.num_tokens * self.act_bytes_per_token + self.logits_bytes + self.library_bytes

    @property
    def staging_bytes(self) -> int:
        return self.num_tokens * self.staging_bytes_per_token

    @property
    def expert_bytes(self) -> int:
        return sum(layer.num_experts * layer.expert_bytes for layer in self.layers)

    @property
    def all_slots_bytes(self) -> int:
        """Device memory that every expert being resident takes."""
        return sum(layer.num_experts * layer.slot_bytes for layer in self.layers)


@dataclass(frozen=True)
class MemoryPlan:
    """What goes where. num_resident_L[l] experts of layer l have a slot on the device."""

    size: ModelSize
    on_gpu: bool  # False: dense weights, KV cache and workspace lie in host memory and share its budget
    gpu_bytes: int
    host_bytes: int
    num_resident_L: tuple[int, ...]

    @property
    def slots_bytes(self) -> int:
        return sum(
            n * layer.slot_bytes for n, layer in zip(self.num_resident_L, self.size.layers, strict=True)
        )

    @property
    def host_expert_bytes(self) -> int:
        return sum(
            (layer.num_experts - n) * layer.expert_bytes
            for n, layer in zip(self.num_resident_L, self.size.layers, strict=True)
        )

    @property
    def gpu_used_bytes(self) -> int:
        return _fixed_bytes(self.size) + self.slots_bytes if self.on_gpu else self.slots_bytes

    @property
    def host_used_bytes(self) -> int:
        return _host_fixed_bytes(self.size, self.on_gpu) + self.host_expert_bytes

    def explain(self) -> str:
        """The arithmetic, one line per budget."""
        num_experts = sum(layer.num_experts for layer in self.size.layers)
        slots = f"{sum(self.num_resident_L)} of {num_experts} experts {text(self.slots_bytes)}"
        dense = _fixed_text(self.size)
        if self.on_gpu:
            gpu = f"{dense} + {slots} = {text(self.gpu_used_bytes)} of {text(self.gpu_bytes)}"
            host = f"other experts {text(self.host_expert_bytes)} + staging {text(self.size.staging_bytes)}"
        else:
            gpu = f"{slots} of {text(self.gpu_bytes)}" if self.gpu_bytes else "none"
            host = f"{dense} + experts {text(self.host_expert_bytes)}"
        return f"GPU:  {gpu}\nhost: {host} = {text(self.host_used_bytes)} of {text(self.host_bytes)}"


def plan_memory(size: ModelSize, on_gpu: bool, gpu_bytes: int, host_bytes: int) -> MemoryPlan:
    """As many resident experts as `gpu_bytes` holds, spread evenly over the layers; the rest on the host.

    on_gpu says that dense weights run on the GPU. Errors: BudgetError with the arithmetic and the remedy.
    """
    fixed_bytes = _fixed_bytes(size) if on_gpu else 0
    if fixed_bytes > gpu_bytes:
        raise BudgetError(
            f"gpu_memory of {text(gpu_bytes)} is short by {text(fixed_bytes - gpu_bytes)}: "
            f"{_fixed_text(size)} = {text(fixed_bytes)}. Give at least gpu_memory={fixed_bytes}, "
            'lower max_context or max_batch, or use device="cpu".',
            fixed_bytes,
        )
    plan = MemoryPlan(size, on_gpu, gpu_bytes, host_bytes, spread_slots(size.layers, gpu_bytes - fixed_bytes))
    if plan.host_used_bytes > host_bytes:
        short_bytes = plan.host_used_bytes - host_bytes
        raise BudgetError(
            f"host_memory of {text(host_bytes)} is short by {text(short_bytes)}: "
            f"{text(plan.host_expert_bytes)} of experts + {text(_host_fixed_bytes(size, on_gpu))} besides. "
            f"Give at least host_memory={plan.host_used_bytes}"
            + (", or a larger gpu_memory." if on_gpu else ", or use a smaller model."),
            plan.host_used_bytes,
        )
    return plan


def spread_slots(layers: tuple[LayerSize, ...], free_bytes: int) -> tuple[int, ...]:
    """Experts per layer, one more for each layer in turn while they fit."""
    counts = [0] * len(layers)
    for round_idx in range(max((layer.num_experts for layer in layers), default=0)):
        for l, layer in enumerate(layers):
            if round_idx < layer.num_experts and layer.slot_bytes <= free_bytes:
                counts[l] += 1
                free_bytes -= layer.slot_bytes
    return tuple(counts)


def _fixed_bytes(size: ModelSize) -> int:
    return size.dense_bytes + size.kv_bytes + size.workspace_bytes


def _host_fixed_bytes(size: ModelSize, on_gpu: bool) -> int:
    return size.staging_bytes if on_gpu else _fixed_bytes(size)


def _fixed_text(size: ModelSize) -> str:
    return (
        f"dense weights {text(size.dense_bytes)} + KV cache of {size.num_tokens} tokens "
        f"{text(size.kv_bytes)} + workspace {text(size.workspace_bytes)}"
    )
