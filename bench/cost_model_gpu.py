"""Layers of experts on GPU, bus and host, timed next to what the cost model says of them: mixes of experts and tokens.

    GPU-resident             all experts in slots; long prompts by grouped products, decode steps in one graph
    GPU-fetched              all over the bus, products behind the copies
    host beside GPU          all on the host, activations there and back
    cut along F              the exact split: residents none, some fetched, one cut, the rest on the host at once
    zero-copy                a decode step's GPU reads nearly all of F in host memory
    zero-copy beside host    the share that the controller finds

Long prompts are predicted by simulating the schedule of their split with the machine's contention, decode steps in
closed form as `monde plan` does. Letters: T tokens, E experts, A active experts, D model dim, F expert hidden dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hostcompute import ExpertBank
from hostcompute.layout import PAD_K
from monde.calibration.graph import capture
from monde.core import Placement, RoutedBatch
from monde.executors.decode import DecodeExecutor, DecodeHub
from monde.executors.prefill import PrefillExecutor
from monde.executors.prefill_hub import PrefillHub
from monde.executors.prefill_size import PrefillSize
from monde.executors.zero_copy import first_share
from monde.planning.cost import CostModel, overlapped_s
from monde.planning.share import best_share
from monde.planning.simulate import contention_of, simulate
from monde.planning.split import Load, best_split
from monde.planning.split_policies import SplitPolicy, all_fetch, all_host
from monde.planning.step import LayerStep, step_schedule
from monde.weights.host import HostBlobs
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable

MAX_ACTIVE, MAX_TOKENS = 16, 256
NUM_REPEATS, NUM_WARM_UPS = 9, 2
# Layers of a captured step at least: replaying a step takes something too, as much as some layers of residents.
NUM_LAYERS, NUM_RESIDENT_LAYERS = 8, 32
STEP_TOKENS, STEP_ACTIVE = 16, 8
NUM_SHARE_STEPS = 40  # the controller needs some to find the share

Ran = tuple[
    str, list[int], float, list[float]
]  # kind, tokens of each active expert, predicted, measured seconds


@dataclass(frozen=True)
class Prompt:
    """Where a long prompt's experts are, and by which rule they are split."""

    kind: str
    is_resident: bool
    policy: SplitPolicy


PROMPTS = (
    Prompt("GPU-resident", True, best_split),
    Prompt("GPU-fetched", False, all_fetch),
    Prompt("host beside GPU", False, all_host),
    Prompt("cut along F", False, best_split),
)


def batch_of(
    tokens_A: NDArray[np.int64], first: int, num_experts: int, d_model: int, device: torch.device
) -> RoutedBatch:
    """Column a names the a-th expert from `first` on, round and round, for its first tokens_A[a] rows."""
    taken_TA = np.arange(tokens_A.max())[:, None] < tokens_A
    ids_TA = np.where(taken_TA, (first + np.arange(len(tokens_A))) % num_experts, -1)
    x_TD = torch.randn(len(ids_TA), d_model, device=device).bfloat16()
    weights_TA = torch.full(ids_TA.shape, 1 / len(tokens_A), device=device)
    return RoutedBatch(x_TD, torch.from_numpy(ids_TA).to(device), weights_TA)


def prompt_s(cost: CostModel, tokens_A: NDArray[np.int64], prompt: Prompt) -> tuple[float, bool]:
    """Seconds of a layer by the schedule of its split, and whether an expert is cut."""
    resident_A = np.full(len(tokens_A), prompt.is_resident)
    load = Load(tokens_A, resident_A, int(tokens_A.max()), PAD_K)
    split = prompt.policy(load, cost)
    layer = LayerStep(cost.gpu.prompt.plan_s, load, split)
    timeline = simulate(step_schedule([layer], cost), contention_of(cost.profile))
    return timeline.makespan_s, split.cut_expert is not None


class Prompts:
    """One bank's experts on the way of long prompts, in slots and out of them. close() when done."""

    def __init__(self, bank: ExpertBank, cost: CostModel, device: torch.device) -> None:
        self.bank, self.cost, self.device = bank, cost, device
        spec, blobs = bank.spec, HostBlobs(bank)
        self.slots = slots_of(blobs, spec.num_experts, device)
        size = PrefillSize.of([spec], torch.bfloat16.itemsize, MAX_TOKENS, MAX_ACTIVE)
        self.hub = PrefillHub(device, size, cost.profile, learns=False)  # plans stay those of the profile
        self.hub.fetches_ahead = False
        everyone, nobody = tuple(range(spec.num_experts)), (-1,) * spec.num_experts
        tables = [SlotTable(Placement(slot_E), device) for slot_E in (nobody, everyone)]
        self.layers = [
            PrefillExecutor(idx, bank, slots, table, self.hub, lambda: blobs)
            for idx, (slots, table) in enumerate(zip((None, self.slots), tables, strict=True))
        ]

    def run(self, prompt: Prompt, mixes: Sequence[NDArray[np.int64]]) -> Iterator[Ran]:
        """Mixes in turn, so that a slow moment meets all of them."""
        self.hub.policy = prompt.policy
        layer, samples = self.layers[prompt.is_resident], list[list[float]]([] for _ in mixes)
        first = 0
        for repeat in range(NUM_REPEATS + NUM_WARM_UPS):
            for i, tokens_A in enumerate(mixes):
                spec = self.bank.spec
                batch = batch_of(tokens_A, first, spec.num_experts, spec.d_model, self.device)
                first += len(tokens_A)
                synchronize(self.device)
                start_s = time.perf_counter()
                layer.forward(batch)
                synchronize(self.device)
                if repeat >= NUM_WARM_UPS:
                    samples[i].append(time.perf_counter() - start_s)
        for tokens_A, samples_s in zip(mixes, samples, strict=True):
            predicted_s, is_cut = prompt_s(self.cost, tokens_A, prompt)
            if (
                is_cut or prompt.kind != "cut along F"
            ):  # where the best split cuts nobody it says nothing of cuts
                yield prompt.kind, tokens_A.tolist(), predicted_s, samples_s

    def close(self) -> None:
        self.hub.close()


@dataclass(frozen=True)
class Sides:
    """Seconds of a captured layer's sides, each alone: all experts by the bus or on the host, and what leads."""

    bus_s: float
    host_s: float
    gpu_lead_s: float
    host_lead_s: float


def sides_of(cost: CostModel, tokens_A: NDArray[np.int64]) -> Sides:
    trip_bytes = int(tokens_A.max()) * cost.shape.act_bytes_per_token
    return Sides(
        float(cost.zero_copy_s(tokens_A).sum()),
        float(cost.host_s(tokens_A).sum()),
        cost.gpu.decode_layer_s,
        float(cost.gpu.round_trip.seconds(trip_bytes)),
    )


def resident_step_s(cost: CostModel, tokens_A: NDArray[np.int64], share: float) -> float:
    return cost.gpu.decode_layer_s + float(cost.resident_s(tokens_A).sum())


def host_step_s(cost: CostModel, tokens_A: NDArray[np.int64], share: float) -> float:
    sides = sides_of(cost, tokens_A)
    return max(sides.gpu_lead_s, sides.host_lead_s + sides.host_s)


def shared_step_s(cost: CostModel, tokens_A: NDArray[np.int64], share: float) -> float:
    """With `share` of F over the bus: whoever is done leaves the memory to the other."""
    sides = sides_of(cost, tokens_A)
    host_s = sides.host_lead_s + (1 - share) * sides.host_s
    gpu_s = sides.gpu_lead_s + share * sides.bus_s
    return float(overlapped_s(host_s, gpu_s, cost.gpu.host_while_copying))


def balanced_step_s(cost: CostModel, tokens_A: NDArray[np.int64], share: float) -> float:
    sides, overlap = sides_of(cost, tokens_A), cost.gpu.host_while_copying
    return best_share(sides.bus_s, sides.host_s, overlap, sides.gpu_lead_s, sides.host_lead_s).step_s


@dataclass(frozen=True)
class Step:
    """How a decode step's experts are computed. share: of F that the bus brings at first; None: nothing of it."""

    kind: str
    is_resident: bool
    share: float | None
    is_balanced: bool
    predict: Callable[[CostModel, NDArray[np.int64], float], float]

    def num_layers(self, num_experts: int, num_active: int) -> int:
        """So many that a step reads every expert of the bank: caches hold some hundred megabytes from step to step."""
        return max(NUM_RESIDENT_LAYERS if self.is_resident else NUM_LAYERS, -(-num_experts // num_active))


def steps_of(cost: CostModel) -> tuple[Step, ...]:
    return (
        Step("GPU-resident, decode", True, None, False, resident_step_s),
        Step("host, decode", False, None, False, host_step_s),
        Step("zero-copy", False, 1.0, False, shared_step_s),
        Step("zero-copy beside host", False, first_share(cost.profile), True, balanced_step_s),
    )


class Steps:
    """Layers of one bank as a captured decode step of one mix. Needs CUDA; close() when done."""

    def __init__(
        self,
        bank: ExpertBank,
        cost: CostModel,
        pool: Any,
        device: torch.device,
        step: Step,
        tokens_A: NDArray[np.int64],
    ) -> None:
        self.cost, self.step, self.device, self.tokens_A = cost, step, device, tokens_A
        spec, blobs, A = bank.spec, HostBlobs(bank), len(tokens_A)
        self.num_layers = step.num_layers(spec.num_experts, A)
        self.hub = DecodeHub(
            [spec] * self.num_layers,
            [bank] * self.num_layers,
            torch.bfloat16,
            device,
            pool,
            share=step.share or 0.0,
        )
        slots = slots_of(blobs, spec.num_experts, device) if step.is_resident else None
        slot_E = tuple(range(spec.num_experts)) if step.is_resident else (-1,) * spec.num_experts
        table, heat_E = SlotTable(Placement(slot_E), device), torch.zeros(spec.num_experts, device=device)
        host = blobs if step.share is not None else None
        self.layers = [
            DecodeExecutor(idx, spec, slots, table, heat_E, self.hub, host) for idx in range(self.num_layers)
        ]
        self.batches = [
            batch_of(tokens_A, l * A, spec.num_experts, spec.d_model, device) for l in range(self.num_layers)
        ]

    def run(self) -> Ran:
        graph = capture(self._forward)
        for _ in range(NUM_SHARE_STEPS if self.step.is_balanced else NUM_WARM_UPS):
            self._replay(graph)
        share = 0.0 if self.hub.balance is None else self.hub.balance.share
        samples_s = [self._replay(graph) / self.num_layers for _ in range(NUM_REPEATS)]
        predicted_s = self.step.predict(self.cost, self.tokens_A, share)
        return self.step.kind, self.tokens_A.tolist(), predicted_s, samples_s

    def _forward(self) -> None:
        for layer, batch in zip(self.layers, self.batches, strict=True):
            layer.forward(batch)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        start_s = time.perf_counter()
        if self.step.is_balanced:
            self.hub.begin_step()
        self.hub.before_replay()
        graph.replay()
        synchronize(self.device)
        seconds = time.perf_counter() - start_s
        self.hub.check()
        return seconds

    def close(self) -> None:
        self.hub.close()


def run_kinds(
    bank: ExpertBank, cost: CostModel, pool: Any, device: torch.device, num_mixes: int
) -> Iterator[tuple[str, Callable[[], Iterator[Ran]]]]:
    """Every kind by name, and what runs it; the bank's memory must be pinned. A kind that fails stops no other."""
    rng = np.random.default_rng(bank.spec.d_ffn)
    long = random_mixes(rng, num_mixes, MAX_TOKENS, MAX_ACTIVE)
    short = random_mixes(rng, num_mixes // 3, STEP_TOKENS, STEP_ACTIVE)

    def prompts(prompt: Prompt) -> Iterator[Ran]:
        layers = Prompts(bank, cost, device)
        try:
            yield from layers.run(prompt, long)
        finally:
            layers.close()

    def steps(step: Step) -> Iterator[Ran]:
        for tokens_A in short:
            layers = Steps(bank, cost, pool, device, step, tokens_A)
            try:
                yield layers.run()
            finally:
                layers.close()

    for prompt in PROMPTS:
        yield prompt.kind, partial(prompts, prompt)
    if device.type == "cuda":
        for step in steps_of(cost):
            yield step.kind, partial(steps, step)


def random_mixes(
    rng: np.random.Generator, num_mixes: int, max_tokens: int, max_active: int
) -> list[NDArray[np.int64]]:
    """Tokens of 1 to `max_active` experts, log-uniform, so that most are few."""
    draws = (
        2 ** rng.uniform(0, np.log2(max_tokens), rng.integers(1, max_active + 1)) for _ in range(num_mixes)
    )
    return [np.rint(draw).astype(np.int64) for draw in draws]


def slots_of(blobs: HostBlobs, num_experts: int, device: torch.device) -> ExpertSlots:
    slots = ExpertSlots(blobs.spec, num_experts, device)
    for e in range(num_experts):
        slots.blobs_SB[e].copy_(blobs.blob_B(e))
    return slots


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
