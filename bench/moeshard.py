"""What MoEShard's evaluation (arXiv 2503.08467) runs, and what it measured: Switch-Base's encoder on four A100-80GB.

Measured: means of the raw files that the authors publish (github.com/sacs-epfl/moe-inference, outputs/, the first three
steps left out): one MoE layer, and a pass of the encoder, of which 6 of 12 blocks have experts. The paper's speed-ups,
2.35 to 6.45 over E, are the ratios of the *layers*; those of whole passes are 1.7 to 4.9.
T tokens of a rank, E experts, k hot experts, D model dim, F expert hidden dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

D_MODEL, D_FFN = 768, 3072
NUM_BLOCKS, NUM_MOE, NUM_HEADS, SEQUENCE = 12, 6, 12, 120
EXPERTS = (8, 16, 32, 64, 128, 256)
BATCH = 250  # sequences of every GPU, where nothing else is said
PAPER_SPEEDUP = 6.4


def num_hot(num_experts: int) -> int:
    """k: the first tenth, rounded up."""
    return math.ceil(num_experts / 10)


@dataclass(frozen=True)
class Router:
    """Experts are drawn with p_e in proportion to 1 / E, and the first tenth of them have more.

    The paper lets them share alpha. The published code gives alpha to each of them (of 128 experts, 13 then get 89% of
    the tokens instead of 44%), which is what the published times were measured with; neither system's depend on it.
    """

    name: str
    alpha: float
    is_shared: bool = True

    def probability_E(self, num_experts: int) -> NDArray[np.float64]:
        k = num_hot(num_experts)
        p_E = np.full(num_experts, 1 / num_experts)
        p_E[:k] += self.alpha / (k if self.is_shared else 1)
        return np.asarray(p_E / p_E.sum())

    def pairs_WE(self, num_ranks: int, num_tokens: int, num_experts: int, seed: int = 0) -> NDArray[np.int64]:
        """Tokens of every rank by expert, top-1."""
        draw = np.random.default_rng(seed).multinomial
        return np.asarray(draw(num_tokens, self.probability_E(num_experts), size=num_ranks), np.int64)


NO_SKEW = Router("none", 0.0)
PAPER = Router("0.6 shared", 0.6)
PUBLISHED_CODE = Router("0.6 each", 0.6, is_shared=False)


def capacity_factor(num_experts: int) -> int:
    """DeepSpeed's, as the paper sets it so that hardly a token is dropped."""
    return min(num_experts, 50)


def capacity(num_tokens: int, num_experts: int, factor: float) -> int:
    """Rows of one expert that a rank sends: DeepSpeed's ceil(T / E * factor), at least the paper's min_capacity of 8."""
    return max(8, math.ceil(num_tokens / num_experts * factor))


@dataclass(frozen=True)
class Measured:
    """Published means: seconds of one MoE layer and of a pass. MoEShard with its grouped kernels ("MegaBlocks")."""

    num_experts: int
    batch: int
    deepspeed_layer_s: float
    deepspeed_encoder_s: float
    moeshard_layer_s: float
    moeshard_encoder_s: float


MEASURED = (
    Measured(8, 250, 29.3e-3, 0.241, 12.5e-3, 0.140),
    Measured(16, 250, 57.5e-3, 0.410, 15.5e-3, 0.158),
    Measured(32, 250, 112.8e-3, 0.742, 19.3e-3, 0.179),
    Measured(64, 250, 174.8e-3, 1.114, 27.1e-3, 0.228),
    Measured(128, 250, 177.6e-3, 1.131, 43.7e-3, 0.327),
    Measured(256, 250, 183.4e-3, 1.166, 76.7e-3, 0.525),
    Measured(128, 10, 9.3e-3, 0.064, 34.0e-3, 0.215),
    Measured(128, 100, 75.6e-3, 0.482, 37.8e-3, 0.258),
    Measured(128, 450, 316.2e-3, 2.010, 50.7e-3, 0.418),
)
