"""How popular experts are, and router weights that make them so.

An expert's logit is a bias, times the constant dimension of the residual stream, plus noise of the token. With many
experts the K-th largest logit is nearly the same for every token, so an expert is chosen with probability
P(bias + noise > threshold), and bias = inverse normal distribution of the wanted probability. What really comes out
is counted (`realised`) and stands in the artefact.

Letters: L layers, T tokens, E experts, K top-k.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.decode.models import moe_blocks
from bench.decode.shapes import Shape
from monde.routing.heat import Heat

SKEWS = ("uniform", "measured", "strong")
MEASURED = Path(__file__).with_name("popularity.json")
ZIPF_EXPONENT = 1.0
_MOST, _LEAST = 0.95, 1e-3  # probabilities with a finite bias


def shares(skew: str, shape: Shape) -> NDArray[np.float64]:
    """share_LE: of all pairs of a layer, those of its r-th most popular expert; rows sum to 1 and fall."""
    E, L = shape.num_experts, shape.num_layers
    if skew == "uniform":
        return np.full((L, E), 1 / E)
    if skew == "strong":
        weight_E = np.arange(1, E + 1) ** -ZIPF_EXPONENT
        return np.tile(weight_E / weight_E.sum(), (L, 1))
    if skew != "measured":
        raise ValueError(f"--skews: expected any of {', '.join(SKEWS)}, got {skew!r}")
    recorded = np.array(json.loads(MEASURED.read_text())["share_LE"])
    return np.stack([resampled(recorded[l % len(recorded)], E) for l in range(L)])


def resampled(share_E: NDArray[np.float64], num_experts: int) -> NDArray[np.float64]:
    """The same popularity over another number of experts: equal shares for equal quantiles of the ranking."""
    total = np.concatenate([[0.0], np.cumsum(share_E)])
    quantiles = np.linspace(0, len(share_E), num_experts + 1)
    return np.diff(np.interp(quantiles, np.arange(len(share_E) + 1), total))


def probabilities(share_E: NDArray[np.float64], num_topk: int) -> NDArray[np.float64]:
    """P(a token chooses the expert), summing to K: K * share, what exceeds the most possible given to the others."""
    wanted_E = np.clip(num_topk * share_E, _LEAST, None)
    capped_E = np.zeros(len(share_E), bool)
    for _ in range(len(share_E)):
        over_E = (wanted_E > _MOST) & ~capped_E
        if not over_E.any():
            break
        capped_E |= over_E
        rest = num_topk - _MOST * capped_E.sum()
        free = wanted_E[~capped_E].sum()
        wanted_E = np.where(capped_E, _MOST, wanted_E * rest / free)
    return wanted_E


def router_biases(skew: str, shape: Shape) -> NDArray[np.float64]:
    """bias_LE in standard deviations of the noise; which expert is popular differs from layer to layer."""
    rng, normal = np.random.default_rng(0), NormalDist()
    biases = []
    for share_E in shares(skew, shape):
        p_E = probabilities(share_E, shape.num_topk)
        biases.append(rng.permutation([normal.inv_cdf(p) for p in p_E]))
    return np.stack(biases)


def apply(skew: str, shape: Shape, dense: dict[str, Tensor]) -> None:
    """Write the biases into the router weights that all models share."""
    for l, bias_E in enumerate(router_biases(skew, shape)):
        weight_ED = dense[f"model.layers.{l}.mlp.gate.weight"]
        weight_ED[:, 0] = torch.from_numpy(bias_E).to(weight_ED) * weight_ED.shape[1] ** -0.5


@torch.no_grad()
def realised(model: Any, shape: Shape, num_tokens: int, seed: int = 0) -> NDArray[np.float64]:
    """p_LE, summing to K: how often a token chose each expert, over random tokens."""
    counts_LE = np.zeros((shape.num_layers, shape.num_experts))

    def count(l: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            ids_R = output[2].flatten().cpu().numpy()
            np.add.at(counts_LE[l], ids_R, 1)

        return hook

    hooks = [block.gate.register_forward_hook(count(l)) for l, (block, _) in enumerate(moe_blocks(model))]
    generator = torch.Generator().manual_seed(seed)
    num_rows = max(1, num_tokens // 128)
    ids_BT = torch.randint(model.config.vocab_size, (num_rows, num_tokens // num_rows), generator=generator)
    model(ids_BT.to(model.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return counts_LE / ids_BT.numel()


def busiest_quarter(p_LE: NDArray[np.float64]) -> float:
    """The share of the pairs that a quarter of the experts takes, the mean over layers; 0.25 where all are equal."""
    sorted_LE = -np.sort(-p_LE, axis=1)
    quarter = sorted_LE[:, : p_LE.shape[1] // 4].sum(1) / p_LE.sum(1)
    return float(quarter.mean())


def heat_of(p_LE: NDArray[np.float64], batch: int, weight_steps: float = 46.0) -> Heat:
    """What the tracker would have counted in the long run; 46 steps are a half-life of 32."""
    counts = tuple((p_E * batch * weight_steps).astype(np.float32) for p_E in p_LE)
    return Heat("", counts, weight_steps)
