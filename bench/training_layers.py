"""FSMoE's configured layers and two whole models in the event simulator, at the paper's published link costs.

Letters: B sequences of a GPU, L tokens of one, M model dim, H hidden dim, f capacity factor, k experts per token.

Assumed, because the paper does not print it: k = 2; every GPU has B * L tokens of its own in the exchange; one expert
a node, cut along F over the node's GPUs; f = * (nothing dropped) has balanced load, so it counts as 1; attention is
tensor parallel inside the node; gradients all-reduced per layer are attention's, 4 M^2 over the GPUs of a node; an
all-gather's and a reduce-scatter's size is the whole tensor of the node, an all-to-all's and an all-reduce's that of
one GPU. Heads change no size here: 1458 configurations are 486 different ones, three times each.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from monde.planning.fit import AlphaBeta
from monde.planning.gradient_slices import BackwardLayer, plan_gradients
from monde.planning.pipeline import (
    COMPUTE,
    MAX_DEGREE,
    Stage,
    Stages,
    backward_of,
    best_degree,
    layer_timeline,
    one_lane,
)
from monde.planning.profile import Overlap
from monde.planning.schedule import Resource
from monde.planning.simulate import Contention, simulate

MS = 1e-3
# How much longer two things take while they run at once. 1.19 and 1.40: mean and worst slow-down of computation beside
# collectives on A100, H100, MI210 and MI250 (arXiv 2507.03114), taken for links as well; 1.0: none.
GAMMAS = (1.0, 1.19, 1.40)
TOP_K = 2


@dataclass(frozen=True)
class Testbed:
    """AlphaBeta over elements of 4 bytes, gemm over floating point operations."""

    name: str
    num_nodes: int
    num_gpus: int  # of a node
    a2a: AlphaBeta
    all_gather: AlphaBeta
    reduce_scatter: AlphaBeta
    all_reduce: AlphaBeta
    gemm: AlphaBeta
    lengths: tuple[int, ...]


def _ms(alpha: float, beta: float, unit: float = 1.0) -> AlphaBeta:
    return AlphaBeta(alpha * MS, beta * unit * MS)


TESTBEDS = (
    Testbed(
        "A: 6 x 8 A6000", 6, 8, _ms(0.2875, 2.3201e-6), _ms(0.3379, 2.3478e-7), _ms(0.3954, 2.2171e-7),
        _ms(0.5114, 4.9512e-6), _ms(0.0426, 2.29e-11), (512, 1024, 2048),
    ),
    Testbed(
        "B: 8 x 4 2080Ti", 8, 4, _ms(0.175, 3.06e-7, 4), _ms(0.032, 1.68e-7, 4), _ms(0.0391, 1.67e-7, 4),
        _ms(0.0837, 5.99e-7, 4), _ms(0.0924, 4.42e-11), (256, 512, 1024),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    batch: int
    length: int
    d_model: int
    d_ffn: int
    capacity: float
    gated: bool


def configured(testbed: Testbed) -> Iterator[Layer]:
    """One of every three: heads change nothing."""
    for B, L, M, ratio, f, gated in itertools.product(
        (1, 2, 4), testbed.lengths, (1024, 2048, 4096), (2, 3, 4), (1.2, 2.4, 1.0), (False, True)
    ):
        yield Layer(B, L, M, ratio * M, f, gated)


def contention(gamma: float) -> Contention:
    both = Overlap(gamma, gamma)
    return {
        (COMPUTE, Resource.LINK_INTER): both,
        (COMPUTE, Resource.LINK_INTRA): both,
        (Resource.LINK_INTER, Resource.LINK_INTRA): both,
    }


def forward_stages(layer: Layer, on: Testbed) -> Stages:
    elements = layer.batch * layer.length * layer.d_model * TOP_K * layer.capacity  # of one GPU
    num_matrices = 3 if layer.gated else 2
    flops = 2 * num_matrices * elements * layer.d_ffn  # num_gpus times the rows, 1 / num_gpus of F
    a2a = Stage(on.a2a.alpha_s, elements * on.a2a.s_per_unit)
    return Stages(
        Stage(num_matrices * on.gemm.alpha_s, flops * on.gemm.s_per_unit),
        a2a,
        a2a,
        Stage(on.all_gather.alpha_s, on.num_gpus * elements * on.all_gather.s_per_unit),
        Stage(on.reduce_scatter.alpha_s, on.num_gpus * elements * on.reduce_scatter.s_per_unit),
    )


def dense_s(layer: Layer, on: Testbed) -> float:
    """Attention's forward on one GPU: a node's tokens, a share of the heads, and the two collectives of that cut."""
    tokens, M = layer.batch * layer.length * on.num_gpus, layer.d_model
    flops = tokens * (8 * M * M + 4 * layer.length * M) / on.num_gpus
    cut = float(on.all_gather.seconds(tokens * M)) + float(on.reduce_scatter.seconds(tokens * M))
    return 4 * on.gemm.alpha_s + flops * on.gemm.s_per_unit + cut


def gradient_elements(layer: Layer, on: Testbed) -> int:
    return 4 * layer.d_model**2 // on.num_gpus


def step_s(layer: Layer, on: Testbed, gamma: float, num_layers: int = 1) -> dict[str, float]:
    """Seconds of forward and backward of `num_layers` such layers with attention, by schedule."""
    forward, between = forward_stages(layer, on), contention(gamma)
    backward, dense = backward_of(forward), dense_s(layer, on)
    one = gradient_elements(layer, on)
    reduced_s = float(on.all_reduce.seconds(one))

    def serial(r: int) -> float:
        return sum(simulate(one_lane(stages, r), between).makespan_s for stages in (forward, backward))

    def hidden_s(seconds_s: float) -> float:
        """The dense backward with the layer's all-reduce beside it."""
        shared = BackwardLayer(Stages(Stage(0.0, 0.0)), 1, 2 * dense, one)
        return (
            plan_gradients([shared], on.all_reduce, one, between, 1).predicted_s if seconds_s else 2 * dense
        )

    pipelined_s = min(serial(r) for r in range(1, MAX_DEGREE + 1))
    degrees = best_degree(forward, between), best_degree(backward, between)
    # Layer l's gradients are made after its own experts' backward: the last layer of forward has none to reduce yet.
    total = one * num_layers
    layers = [
        BackwardLayer(
            backward, degrees[1], 2 * dense, total if num_layers == 1 else one * (num_layers - 1 - position)
        )
        for position in range(num_layers)
    ]
    plan = plan_gradients(layers, on.all_reduce, total, between, 8 if num_layers == 1 else num_layers)
    forward_s = layer_timeline(forward, degrees[0], between).makespan_s + dense
    return {
        "deepspeed": num_layers * (serial(1) + 3 * dense + reduced_s),
        "tutel": num_layers * (pipelined_s + 3 * dense + reduced_s),
        "tutel, gradients beside attention": num_layers * (pipelined_s + dense + hidden_s(reduced_s)),
        "monde": num_layers * forward_s + plan.predicted_s,
    }


MODELS = {
    "GPT2-XL": (Layer(1, 0, 1600, 6400, 1.2, False), 48),
    "Mixtral-8x7B": (Layer(1, 0, 4096, 14336, 1.2, True), 32),
}
BASELINES = ("tutel", "tutel, gradients beside attention", "deepspeed")


def study() -> dict[str, Any]:
    results: dict[str, Any] = {"layers": [], "models": []}
    for on, gamma in itertools.product(TESTBEDS, GAMMAS):
        steps = [step_s(layer, on, gamma) for layer in configured(on)]
        row = {"testbed": on.name, "gamma": gamma, "num_configurations": 3 * len(steps)}
        for name in BASELINES:
            gains = sorted(step[name] / step["monde"] for step in steps)
            row[name] = {
                "mean": statistics.fmean(gains), "min": gains[0], "median": statistics.median(gains), "max": gains[-1],
            }  # fmt: skip
        results["layers"].append(row)
        print(
            f"{on.name}, gamma {gamma}: " + ", ".join(f"{row[n]['mean']:.3f}x over {n}" for n in BASELINES),
            flush=True,
        )
        for name, (layer, num_layers) in MODELS.items():
            made = step_s(replace(layer, length=on.lengths[1]), on, gamma, num_layers)
            gains = {n: made[n] / made["monde"] for n in BASELINES}
            results["models"].append(
                {"model": name, "testbed": on.name, "gamma": gamma, "seconds": made, "gains": gains}
            )
            print(f"  {name}: " + ", ".join(f"{gains[n]:.2f}x over {n}" for n in BASELINES), flush=True)
    return results
