"""Will it fit? Pure arithmetic over sizes, done before anything is loaded.

dense weights + KV cache + workspace + slots of resident experts <= gpu_memory
experts on the host + staging                                    <= host_memory

Experts on the host are those without a slot, and so that residents can change, those of layers with some slots as
well; or, where host_memory is too tight for that, some spare places, of which one that leaves its slot takes one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from monde.sizes import format_bytes as text

_OR_SHORTER = ", use shorter or fewer sequences (max_context, max_batch)"
# A round of swaps takes as many at most; more would wait in host memory for nobody.
MAX_SPARE_PLACES = 16


class BudgetError(ValueError):
    """The budget cannot be met: why, by how much it is short, and the least of the same memory that would work.

    shorter_fits: whether the shortest sequence would fit.
    """

    def __init__(
        self, why: str, remedy: str, short_bytes: int, smallest_bytes: int, shorter_fits: bool
    ) -> None:
        super().__init__(f"{why} {remedy}")
        self.why, self.short_bytes, self.smallest_bytes = why, short_bytes, smallest_bytes
        self.shorter_fits = shorter_fits


@dataclass(frozen=True)
class LayerSize:
    """One MoE layer: its number of experts, the bytes of one, and those of a slot, which pads an expert.

    kept_bytes: what stays on the host of a resident whose copy there is released: its biases.
    """

    num_experts: int
    expert_bytes: int
    slot_bytes: int
    kept_bytes: int = 0


@dataclass(frozen=True)
class ModelSize:
    """Everything the arithmetic needs to know about a model and its use.

    num_tokens is the longest sequence times the largest batch; kv_bytes_per_token sums all attention layers;
    state_bytes is what layers without keys and values keep of all sequences;
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
    state_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        return self.num_tokens * self.kv_bytes_per_token + self.state_bytes

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
    """What goes where. num_resident_L[l] experts of layer l have a slot on the device.

    wants_moves: residents shall change while the model runs; `moves` says whether host memory lets them.
    """

    size: ModelSize
    on_gpu: bool  # False: dense weights, KV cache and workspace lie in host memory and share its budget
    gpu_bytes: int
    host_bytes: int
    num_resident_L: tuple[int, ...]
    wants_moves: bool = False

    @property
    def movable_L(self) -> tuple[bool, ...]:
        """Layers in which some experts have a slot and some have not: only there a swap is possible."""
        pairs = zip(self.num_resident_L, self.size.layers, strict=True)
        return tuple(0 < n < layer.num_experts for n, layer in pairs)

    @property
    def moves(self) -> bool:
        return self.wants_moves and any(self.movable_L) and self.short_for_moves_bytes == 0

    @property
    def releases(self) -> bool:
        """Whether residents move without a copy in host memory: one that leaves its slot goes to a spare place."""
        return self.moves and self._short_for_copies_bytes > 0

    @property
    def num_spare_places(self) -> int:
        """Of each size of experts that move; 0 where they have copies, or stay."""
        if not self.releases:
            return 0
        return min(MAX_SPARE_PLACES, self._host_room_bytes // self._spare_bytes)

    @property
    def num_released(self) -> int:
        """Residents without a copy in host memory that move all the same."""
        if not self.releases:
            return 0
        return sum(n for n, moves in zip(self.num_resident_L, self.movable_L, strict=True) if moves)

    @property
    def num_cold_of_released(self) -> dict[int, int]:
        """Experts without a slot of the layers with such residents, by layer index."""
        rows = enumerate(zip(self.num_resident_L, self.movable_L, self.size.layers, strict=True))
        return {l: layer.num_experts - n for l, (n, moves, layer) in rows if moves and self.releases}

    @property
    def saved_bytes(self) -> int:
        """What releasing saves of host memory, spare places taken off."""
        return self._host_expert_bytes(self.movable_L) - self.host_expert_bytes if self.releases else 0

    @property
    def short_for_moves_bytes(self) -> int:
        """What host_memory lacks so that a swap may evict a resident: for copies of all, or for one spare place."""
        return min(self._short_for_copies_bytes, max(0, self._spare_bytes - self._host_room_bytes))

    @property
    def _short_for_copies_bytes(self) -> int:
        fixed_bytes = _host_fixed_bytes(self.size, self.on_gpu)
        return max(0, fixed_bytes + self._host_expert_bytes(self.movable_L) - self.host_bytes)

    @property
    def _host_room_bytes(self) -> int:
        """What host_memory has left for spare places; negative where released residents do not fit."""
        return self.host_bytes - _host_fixed_bytes(self.size, self.on_gpu) - self._released_bytes

    @property
    def _released_bytes(self) -> int:
        """Of experts on the host, with residents released and before any spare place."""
        rows = zip(self.num_resident_L, self.movable_L, self.size.layers, strict=True)
        kept_bytes = sum(n * layer.kept_bytes for n, moves, layer in rows if moves)
        return self._host_expert_bytes((False,) * len(self.num_resident_L)) + kept_bytes

    @property
    def _spare_bytes(self) -> int:
        """One place of each size of experts that may move."""
        pairs = zip(self.movable_L, self.size.layers, strict=True)
        return sum({layer.expert_bytes for moves, layer in pairs if moves})

    @property
    def slots_bytes(self) -> int:
        return sum(
            n * layer.slot_bytes for n, layer in zip(self.num_resident_L, self.size.layers, strict=True)
        )

    @property
    def host_expert_bytes(self) -> int:
        if self.releases:
            return self._released_bytes + self.num_spare_places * self._spare_bytes
        return self._host_expert_bytes(self.movable_L if self.moves else (False,) * len(self.num_resident_L))

    def _host_expert_bytes(self, holds_all_L: tuple[bool, ...]) -> int:
        rows = zip(self.num_resident_L, holds_all_L, self.size.layers, strict=True)
        return sum(
            (layer.num_experts - (0 if holds_all else n)) * layer.expert_bytes for n, holds_all, layer in rows
        )

    @property
    def gpu_used_bytes(self) -> int:
        return _fixed_bytes(self.size) + self.slots_bytes if self.on_gpu else self.slots_bytes

    @property
    def host_used_bytes(self) -> int:
        return _host_fixed_bytes(self.size, self.on_gpu) + self.host_expert_bytes

    def explain(self) -> str:
        """The arithmetic, one line per budget, and whether residents may change where that was asked for."""
        num_experts = sum(layer.num_experts for layer in self.size.layers)
        slots = f"{sum(self.num_resident_L)} of {num_experts} experts {text(self.slots_bytes)}"
        dense = _fixed_text(self.size)
        if self.on_gpu:
            gpu = f"{dense} + {slots} = {text(self.gpu_used_bytes)} of {text(self.gpu_bytes)}"
            host = f"{self._host_experts_text} + staging {text(self.size.staging_bytes)}"
        else:
            gpu = f"{slots} of {text(self.gpu_bytes)}" if self.gpu_bytes else "none"
            host = f"{dense} + {self._host_experts_text}"
        lines = [f"GPU:  {gpu}", f"host: {host} = {text(self.host_used_bytes)} of {text(self.host_bytes)}"]
        if self.wants_moves and any(self.movable_L):
            released = f"; {self.released_text}" if self.releases else ""
            lines.append(f"residency: {f'follows the routing{released}' if self.moves else self.why_static}")
        return "\n".join(lines)

    @property
    def _host_experts_text(self) -> str:
        num_here = sum(self.num_resident_L)
        if num_here == sum(layer.num_experts for layer in self.size.layers):
            return "no experts"
        has_all = num_here == 0 or (self.moves and not self.releases)
        spares = f" with {self.num_spare_places} spare places" if self.releases else ""
        return f"{'all' if has_all else 'other'} experts {text(self.host_expert_bytes)}{spares}"

    @property
    def released_text(self) -> str:
        return f"host copies of {self.num_released} residents released ({text(self.saved_bytes)} saved)"

    @property
    def why_static(self) -> str:
        """Why residents cannot change although that was asked for, with the remedy."""
        return (
            f"static, as host_memory is short by {text(self.short_for_moves_bytes)} of a place for one that leaves its "
            f"slot; give host_memory={self.host_bytes + self.short_for_moves_bytes}"
        )


Spread = Callable[[tuple[LayerSize, ...], int], tuple[int, ...]]


def plan_memory(
    size: ModelSize,
    on_gpu: bool,
    gpu_bytes: int,
    host_bytes: int,
    wants_moves: bool = False,
    spread: Spread | None = None,
) -> MemoryPlan:
    """As many resident experts as `gpu_bytes` holds; the rest on the host.

    on_gpu says that dense weights run on the GPU; wants_moves is MemoryPlan's; spread(layers, bytes) gives the
    number of slots of every layer, by default spread_slots. Errors: BudgetError with the arithmetic and the remedy.
    """
    fixed_bytes = _fixed_bytes(size) if on_gpu else 0
    would_fit_shorter = partial(fits_shorter, size, on_gpu, gpu_bytes, host_bytes, spread)
    if fixed_bytes > gpu_bytes:
        short_bytes, shorter_fits = fixed_bytes - gpu_bytes, would_fit_shorter()
        raise BudgetError(
            f"gpu_memory of {text(gpu_bytes)} is short by {text(short_bytes)}: "
            f"{_fixed_text(size)} = {text(fixed_bytes)}.",
            f'Give at least gpu_memory={fixed_bytes}{_OR_SHORTER * shorter_fits}, or use device="cpu".',
            short_bytes,
            fixed_bytes,
            shorter_fits,
        )
    num_resident_L = (spread or spread_slots)(size.layers, gpu_bytes - fixed_bytes)
    plan = MemoryPlan(size, on_gpu, gpu_bytes, host_bytes, num_resident_L, wants_moves)
    if plan.host_used_bytes > host_bytes:
        short_bytes, shorter_fits = plan.host_used_bytes - host_bytes, would_fit_shorter()
        besides = f"staging {text(size.staging_bytes)}" if on_gpu else _fixed_text(size)
        raise BudgetError(
            f"host_memory of {text(host_bytes)} is short by {text(short_bytes)}: "
            f"experts {text(plan.host_expert_bytes)} + {besides} = {text(plan.host_used_bytes)}.",
            f"Give at least host_memory={plan.host_used_bytes}{_OR_SHORTER * shorter_fits}, "
            f"or {'give more gpu_memory' if on_gpu else 'use a smaller model'}.",
            short_bytes,
            plan.host_used_bytes,
            shorter_fits,
        )
    return plan


def smallest_gpu_bytes(size: ModelSize, host_bytes: int, spread: Spread | None = None) -> int | None:
    """The least gpu_memory with which dense weights run on the GPU and the rest fits host_bytes.

    None where not even all experts on the GPU would do. spread: as plan_memory's.
    """
    low_bytes, high_bytes = _fixed_bytes(size), _fixed_bytes(size) + size.all_slots_bytes

    def fits(gpu_bytes: int) -> bool:
        try:
            plan_memory(size, True, gpu_bytes, host_bytes, spread=spread)
        except BudgetError:
            return False
        return True

    if not fits(high_bytes):
        return None
    while low_bytes < high_bytes:
        middle_bytes = (low_bytes + high_bytes) // 2
        if fits(middle_bytes):
            high_bytes = middle_bytes
        else:
            low_bytes = middle_bytes + 1
    return high_bytes


def spread_slots(layers: tuple[LayerSize, ...], free_bytes: int) -> tuple[int, ...]:
    """Experts per layer, one more for each layer in turn while they fit."""
    counts = [0] * len(layers)
    for round_idx in range(max((layer.num_experts for layer in layers), default=0)):
        for l, layer in enumerate(layers):
            if round_idx < layer.num_experts and layer.slot_bytes <= free_bytes:
                counts[l] += 1
                free_bytes -= layer.slot_bytes
    return tuple(counts)


def fits_shorter(
    size: ModelSize, on_gpu: bool, gpu_bytes: int, host_bytes: int, spread: Spread | None = None
) -> bool:
    """Whether the shortest sequence fits, where this one does not."""
    if size.num_tokens == 1:
        return False
    try:
        plan_memory(replace(size, num_tokens=1), on_gpu, gpu_bytes, host_bytes, spread=spread)
    except BudgetError:
        return False
    return True


def _fixed_bytes(size: ModelSize) -> int:
    return size.dense_bytes + size.kv_bytes + size.workspace_bytes


def _host_fixed_bytes(size: ModelSize, on_gpu: bool) -> int:
    return size.staging_bytes if on_gpu else _fixed_bytes(size)


def _fixed_text(size: ModelSize) -> str:
    return (
        f"dense weights {text(size.dense_bytes)} + KV cache of {size.num_tokens} tokens "
        f"{text(size.kv_bytes)} + workspace {text(size.workspace_bytes)}"
    )
