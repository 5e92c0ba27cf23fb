"""Passes through MoNDE's models: their dense blocks at true dimensions, and who computes the experts between them.

T tokens, E experts, K top-k, D model dim, F expert hidden dim, L layers with experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders.host_experts import HostLayer, copy_stream
from bench.contenders.lru import MIN_SLOTS, LruExperts
from bench.monde_paper import Model, Workload
from hostcompute import Activation, ActivationKind, ExpertSpec
from monde.config import MondeConfig
from monde.engine import Engine
from monde.planning.budget import LayerSize, MemoryPlan, ModelSize
from monde.weights.slots import slot_bytes

DTYPE = torch.bfloat16
HEAD_DIM, NUM_ROUTINGS = 64, 8
NUM_WARM_UPS = {"encoder": 8, "decoder": 60}  # monde's plans and shares follow what steps take


def spec_of(model: Model) -> ExpertSpec:
    activation = Activation(ActivationKind.RELU)
    return ExpertSpec(model.num_experts, model.d_model, model.d_ffn, gated=False, activation=activation)


# ---- the dense part ----
class DenseBlock:
    """Attention, twice in a decoder, and the dense FFN of blocks without experts."""

    def __init__(self, model: Model, workload: Workload, is_moe: bool, device: torch.device) -> None:
        D, self.workload = model.d_model, workload
        num_attentions = 1 if workload.part == "encoder" else 2

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=DTYPE) * columns**-0.5

        self.projections = [[matrix(D, D) for _ in range(4)] for _ in range(num_attentions)]
        self.ffn = None if is_moe else (matrix(model.d_ffn, D), matrix(D, model.d_ffn))
        self.heads = D // HEAD_DIM
        past = (workload.batch, self.heads, workload.sequence, HEAD_DIM)
        self.past = None if workload.part == "encoder" else torch.randn(past, device=device, dtype=DTYPE)

    def __call__(self, x_TD: Tensor) -> Tensor:
        for q_DD, k_DD, v_DD, o_DD in self.projections:
            q, k, v = (self._split(F.linear(x_TD, w)) for w in (q_DD, k_DD, v_DD))
            if self.past is not None:
                k, v = self.past, self.past
            y = F.scaled_dot_product_attention(q, k, v)
            x_TD = _normed(x_TD + F.linear(y.transpose(1, 2).reshape(x_TD.shape), o_DD))
        if self.ffn is not None:
            in_FD, out_DF = self.ffn
            x_TD = _normed(x_TD + F.linear(F.relu(F.linear(x_TD, in_FD)), out_DF))
        return x_TD

    def _split(self, x_TD: Tensor) -> Tensor:
        return x_TD.view(self.workload.batch, -1, self.heads, HEAD_DIM).transpose(1, 2)


def _normed(x_TD: Tensor) -> Tensor:
    return F.rms_norm(x_TD, x_TD.shape[-1:])


# ---- the experts ----
class Experts(Protocol):
    """Who computes the experts of all layers."""

    name: str
    has_graph: bool

    def layer(self, layer_idx: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor: ...

    def before_replay(self) -> None: ...


class Nothing:
    name, has_graph = "no experts", True

    def layer(self, layer_idx: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return x_TD

    def before_replay(self) -> None: ...


class OnDemand:
    """Pinned parameters, fetched when wanted, the last used ones kept: with MIN_SLOTS none is found again."""

    has_graph = False  # the host must know what is wanted

    def __init__(self, layers: list[HostLayer], num_slots: int, device: torch.device) -> None:
        self.name = "on demand" if num_slots == MIN_SLOTS else "on demand, LRU"
        stream = copy_stream(device)
        self.layers = [LruExperts(layer, num_slots, device, stream) for layer in layers]

    def layer(self, layer_idx: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD: Tensor = self.layers[layer_idx](x_TD, ids_TK, weights_TK)
        return y_TD

    def before_replay(self) -> None: ...


class Monde:
    """monde's engine. The first experts are resident, which are the most popular ones here (`routings`)."""

    name = "monde"

    def __init__(
        self, model: Model, num_layers: int, num_resident: int, num_tokens: int, device: torch.device
    ) -> None:
        spec = spec_of(model)
        layer = LayerSize(spec.num_experts, spec.expert_bytes, slot_bytes(spec))
        size = ModelSize(0, 0, 0, 0, 6 * spec.d_model, num_tokens, (layer,) * num_layers)
        slots_bytes = num_resident * num_layers * layer.slot_bytes
        host_bytes = psutil.virtual_memory().available
        residents_L = (num_resident,) * num_layers
        plan = MemoryPlan(size, device.type == "cuda", slots_bytes, host_bytes, residents_L, False)
        config = MondeConfig(device=str(device), residency="static")
        self.engine = Engine(config, [spec] * num_layers, plan, device)
        arrays = dict(zip(("up", "down"), one_expert(model), strict=True))
        for layer_idx in range(num_layers):
            for e in range(spec.num_experts):
                self.engine.load_expert(layer_idx, e, arrays)

    @property
    def has_graph(self) -> bool:
        return not self.engine.why_not_decode

    def layer(self, layer_idx: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.engine.layers[layer_idx].forward(x_TD, ids_TK, weights_TK)

    def before_replay(self) -> None:
        self.engine.begin_step()
        self.engine.before_replay()

    def close(self) -> None:
        self.engine.close()


def one_expert(model: Model) -> tuple[Tensor, Tensor]:
    """in_FD, out_DF. Every expert gets memory of its own with these values: what they are changes no time."""
    generator = torch.Generator().manual_seed(0)
    D, F_ = model.d_model, model.d_ffn
    in_FD = torch.randn(F_, D, generator=generator) * D**-0.5
    return in_FD.to(DTYPE), (torch.randn(D, F_, generator=generator) * F_**-0.5).to(DTYPE)


def host_layers(model: Model, num_layers: int, device: torch.device) -> list[HostLayer]:
    """Row-major and pinned, for those who fetch."""
    pinned, matrices = device.type == "cuda", one_expert(model)
    return [
        HostLayer(
            *(
                torch.empty(model.num_experts, *m.shape, dtype=DTYPE, pin_memory=pinned).copy_(m)
                for m in matrices
            )
        )
        for _ in range(num_layers)
    ]


# ---- a pass ----
class Pass:
    """The blocks of one workload, with whoever computes the experts."""

    def __init__(self, model: Model, workload: Workload, num_layers: int, device: torch.device) -> None:
        self.model, self.workload, self.num_layers, self.device = model, workload, num_layers, device
        self.blocks = [
            DenseBlock(model, workload, (b + 1) % model.moe_every == 0, device)
            for b in range(num_layers * model.moe_every)
        ]
        T, K = workload.num_tokens, model.num_topk
        self.x_TD = torch.randn(T, model.d_model, device=device, dtype=DTYPE)
        self.weights_TK = torch.full((T, K), 1 / K, device=device, dtype=DTYPE)
        self.routings = routings(model, workload, num_layers, device)
        self.ids_LTK = self.routings[0].clone()

    def run(self, experts: Experts) -> Tensor:
        x_TD = self.x_TD
        for b, block in enumerate(self.blocks):
            x_TD = block(x_TD)
            l, inside = divmod(b, self.model.moe_every)
            if inside == self.model.moe_every - 1:
                x_TD = _normed(x_TD + experts.layer(l, x_TD, self.ids_LTK[l], self.weights_TK))
        return x_TD

    @torch.no_grad()
    def samples_s(self, experts: Experts, num_passes: int) -> list[float]:
        """Seconds of every pass, with fresh routing in each; a decoder's as one graph where that can be."""
        if self.device.type != "cuda":
            return self._timed(lambda: self.run(experts), num_passes)
        if self.workload.part == "encoder" or not experts.has_graph:
            return self._timed(lambda: self.run(experts), num_passes)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                self.run(experts)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            self.run(experts)

        def replay() -> None:
            experts.before_replay()
            graph.replay()

        return self._timed(replay, num_passes)

    def _timed(self, run: Callable[[], object], num_passes: int) -> list[float]:
        samples = []
        num_warm_ups = NUM_WARM_UPS[self.workload.part] if self.device.type == "cuda" else 1
        for i in range(num_warm_ups + num_passes):
            self.ids_LTK.copy_(self.routings[i % NUM_ROUTINGS])
            _synchronize(self.device)
            start_s = time.perf_counter()
            run()
            _synchronize(self.device)
            samples.append(time.perf_counter() - start_s)
        return samples[num_warm_ups:]

    def bytes_moved(self, num_resident: int) -> tuple[float, float]:
        """Weight bytes of a pass, each active expert once: (not on the GPU, on the GPU)."""
        expert_bytes = spec_of(self.model).expert_bytes
        cold = resident = 0
        for ids_LTK in self.routings:
            for ids_TK in ids_LTK:
                unique = ids_TK.unique()
                resident += int((unique < num_resident).sum())
                cold += int((unique >= num_resident).sum())
        return cold * expert_bytes / NUM_ROUTINGS, resident * expert_bytes / NUM_ROUTINGS


def routings(model: Model, workload: Workload, num_layers: int, device: torch.device) -> list[Tensor]:
    """NUM_ROUTINGS times [L, T, K]: K distinct experts a token, drawn by 1 / rank ** skew; expert 0 is the favourite."""
    generator = torch.Generator(device).manual_seed(0)
    log_p_E = -workload.skew * torch.arange(1, model.num_experts + 1, device=device).log()
    shape = (num_layers, workload.num_tokens, model.num_experts)
    found = []
    for _ in range(NUM_ROUTINGS):
        # The K largest of log p + Gumbel noise are K distinct experts drawn by p.
        gumbel = -torch.empty(shape, device=device).exponential_(generator=generator).log()
        found.append((log_p_E + gumbel).topk(model.num_topk, dim=-1).indices)
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
