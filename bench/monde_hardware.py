"""MoNDE's own experiment on this machine: its models' true dimensions, monde against on-demand parameter offloading.

    python -m bench.monde_hardware                          as many layers as `--layers` says, everything
    python -m bench.monde_hardware --toy --device cpu       the same code on a small model

A pass of `num_layers` layers with experts and the dense blocks between them: the encoder over batch x 512 tokens, or
one step of the decoder over batch tokens. Experts are ungated, routing is skewed as in bench.monde_paper. Contenders
have the same pinned host memory and the same number of experts on the GPU: none, or a quarter of each layer's.

    bound = dense part (measured) + max(bytes of active experts that are not on the GPU / what host reads and copies
            move together, bytes of those that are / HBM bandwidth) + a hand-over a layer
    physics = time of on-demand offloading / bound: the most that any speed-up could be here

T tokens, E experts, K top-k, D model dim, F expert hidden dim, L layers with experts.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import artefact
from bench.contenders.base import free_memory
from bench.contenders.host_experts import HostLayer, copy_stream
from bench.contenders.lru import MIN_SLOTS, LruExperts
from bench.decode import ceilings
from bench.decode.bound import Ceilings
from bench.decode.shapes import Shape
from bench.monde_paper import MODELS, Model, Workload
from hostcompute import Activation, ActivationKind, ExpertSpec
from monde.config import MondeConfig
from monde.engine import Engine
from monde.planning.budget import LayerSize, MemoryPlan, ModelSize
from monde.weights.slots import slot_bytes

TOY = Model("toy", 64, 128, 16, 2, 4, 2)
WANTED = {"encoder": 7.5, "decoder": 3.7}  # the paper's simulated headline
NEAR_BOUND = 0.85
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


# ---- the experiment ----
@dataclass(frozen=True)
class Row:
    """One contender in one case; times are of a pass."""

    model: str
    part: str
    batch: int
    num_layers: int
    contender: str
    num_resident: int
    median_s: float
    samples_s: list[float]
    dense_s: float
    bound_s: float
    cold_bytes: float
    resident_bytes: float


def measure(
    model: Model,
    num_layers: int,
    workloads: list[Workload],
    num_passes: int,
    top: Ceilings,
    device: torch.device,
    memory: ceilings.HostMemory | None,
) -> Iterator[Row]:
    passes = [Pass(model, workload, num_layers, device) for workload in workloads]
    dense_s = {p.workload: statistics.median(p.samples_s(Nothing(), num_passes)) for p in passes}

    def rows_of(experts: Experts, num_resident: int) -> Iterator[Row]:
        for one in passes:
            before = top if memory is None else ceilings.with_reads(top, memory.reads())
            samples = one.samples_s(experts, num_passes)
            after = top if memory is None else ceilings.with_reads(top, memory.reads())
            cold_bytes_per_s = statistics.mean((before.cold_bytes_per_s, after.cold_bytes_per_s))
            row = _row(one, experts.name, num_resident, samples, dense_s[one.workload], top, cold_bytes_per_s)
            print(line(row), flush=True)
            yield row

    quarter = model.num_experts // 4
    host = host_layers(model, num_layers, device)
    for num_resident, num_slots in ((0, MIN_SLOTS), (quarter, quarter)):
        yield from rows_of(OnDemand(host, num_slots, device), num_resident)
        free_memory()
    del host
    free_memory()
    num_tokens = max(workload.num_tokens for workload in workloads)
    for num_resident in (0, quarter):
        experts = Monde(model, num_layers, num_resident, num_tokens, device)
        yield from rows_of(experts, num_resident)
        experts.close()
        del experts
        free_memory()


def _row(
    one: Pass,
    name: str,
    num_resident: int,
    samples: list[float],
    dense_s: float,
    top: Ceilings,
    cold_bytes_per_s: float,
) -> Row:
    """cold_bytes_per_s: when the samples were taken."""
    cold, resident = one.bytes_moved(num_resident)
    read_s = max(cold / cold_bytes_per_s, resident / top.hbm_read_bytes_per_s)
    bound_s = dense_s + read_s + one.num_layers * top.round_trip_s
    return Row(
        one.model.name,
        one.workload.part,
        one.workload.batch,
        one.num_layers,
        name,
        num_resident,
        statistics.median(samples),
        samples,
        dense_s,
        bound_s,
        cold,
        resident,
    )


def line(row: Row) -> str:
    return (
        f"| {row.model} | {row.part} | {row.batch} | {row.contender} | {row.num_resident} | {row.median_s * 1e3:.2f} "
        f"| {row.dense_s * 1e3:.2f} | {row.bound_s * 1e3:.2f} | {row.bound_s / row.median_s:.0%} |"
    )


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    """Per case: monde's speed-up over plain on-demand offloading, the most that could be, and which target is met."""
    found = []
    baselines = {(r.model, r.part, r.batch): r for r in rows if r.contender == "on demand"}
    for row in rows:
        if row.contender != "monde":
            continue
        baseline = baselines[row.model, row.part, row.batch]
        speed_up, physics = baseline.median_s / row.median_s, baseline.median_s / row.bound_s
        met = speed_up >= WANTED[row.part] or row.bound_s / row.median_s >= NEAR_BOUND
        found.append(
            {
                "case": f"{row.model}, {row.part}, batch {row.batch}, {row.num_resident} resident",
                "speed_up": speed_up,
                "wanted": WANTED[row.part],
                "physics": physics,
                "of_bound": row.bound_s / row.median_s,
                "met": met,
            }
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.monde_hardware", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--models", default="Switch-Large-128,NLLB-MoE-54B", help="comma-separated (default both)"
    )
    parser.add_argument(
        "--layers", default="4,2", help="layers with experts of each (default 4,2: 9 and 17 GB)"
    )
    parser.add_argument("--parts", default="encoder,decoder")
    parser.add_argument("--batches", default="1,4,16", help="sequences (default 1,4,16)")
    parser.add_argument("--passes", type=int, default=20, help="timed passes of a case (default 20)")
    parser.add_argument("--toy", action="store_true", help="a small model, for machines without a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where the artefact goes (default: bench/results/)")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and not args.toy:
        parser.error("--device cpu: the true dimensions are for a GPU; add --toy")
    device = torch.device("cuda", 0) if args.device.startswith("cuda") else torch.device(args.device)
    known = {model.name: model for model in MODELS}
    names, layers = ([TOY.name], "2") if args.toy else (args.models.split(","), args.layers)
    counts = [int(count) for count in layers.split(",")]
    if unknown := [name for name in names if name not in known and name != TOY.name]:
        parser.error(f"--models: expected any of {', '.join(known)}, got {', '.join(unknown)}")
    if len(counts) != len(names):
        parser.error(f"--layers: expected one number for each of {len(names)} models, got {args.layers}")
    sequence = 16 if args.toy else 512
    workloads = [
        Workload(part, int(batch), sequence=sequence)
        for part in args.parts.split(",")
        for batch in args.batches.split(",")
    ]
    rows: list[Row] = []
    tops: dict[str, Any] = {}
    print("| model | part | batch | experts by | resident | ms | dense | bound | of it |\n|" + "---|" * 9)
    configuration = {k: v for k, v in vars(args).items() if k != "out"}
    configuration["gpu"] = torch.cuda.get_device_name() if device.type == "cuda" else None
    with artefact.kept("monde_hardware", configuration, lambda: _results(tops, rows), args.out):
        for name, num_layers in zip(names, counts, strict=True):
            model = TOY if args.toy else known[name]
            shape = Shape(
                name, num_layers, num_layers, model.num_experts, model.num_topk, model.d_model, model.d_ffn
            )
            memory = ceilings.HostMemory.of_a_layer(device) if device.type == "cuda" else None
            top = ceilings.measure(shape, memory)
            tops[name] = dataclasses.asdict(top)
            rows += measure(model, num_layers, workloads, args.passes, top, device, memory)
            del memory


def _results(tops: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    found = verdicts(rows)
    for verdict in found:
        told = "met   " if verdict["met"] else "MISSED"
        print(
            f"{told} {verdict['case']}: {verdict['speed_up']:.2f}x of {verdict['wanted']}x wanted, at most "
            f"{verdict['physics']:.2f}x here; {verdict['of_bound']:.0%} of the bound"
        )
    return {"ceilings": tops, "rows": [dataclasses.asdict(row) for row in rows], "verdicts": found}


if __name__ == "__main__":
    main()
