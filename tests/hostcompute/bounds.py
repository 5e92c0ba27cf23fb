"""How far a correct forward may be from the float64 oracle, element by element, derived and not tuned.

Letters: T tokens, K top-k, D model dim, F expert hidden dim. u = 2^-p is the unit roundoff of a p-bit
significand: fp32 2^-24, f16 2^-11, bf16 2^-8. |W||x| is the product of the absolute values, |W|^2 the matrix
of squares. The oracle takes the very same stored weights and inputs, so only the arithmetic differs.

Every rounding is an error of at most u times the value, of either sign: a sub-Gaussian variable with that
deviation. Deviations are propagated to first order; independent ones add in squares. A sum of n fp32 terms in
any order has the deviation sqrt(n) u |W||x| (Higham and Mary, A New Approach to Probabilistic Rounding Error
Analysis, 2019). A correct element exceeds CONFIDENCE = 6 deviations with a probability of 2 exp(-18), 3e-8.
The worst case, n u in place of sqrt(n) u, would let a kernel with bf16 dot products be wrong by half of the
answer: a bound that proves nothing.

1. g = W x + b, D products:       s_g^2 = |W|^2 (u' |x|)^2 + (D + 2) (u (|W||x| + |b|))^2
   with u' = u_bf16 where x is rounded for bf16 dots, else 0
2. h = act(g) u:                  s_h = L s_g (|u| + s_u) + |act(g)| s_u + EVALUATION u |g| |u|
   L bounds |act'|: 1.1 for SiLU (its derivative peaks at 1.0999, whatever alpha), 1.13 for GELU, 1 for ReLU;
   ReLU^2 has 2 (|g| + s_g). Clamping and cap tanh(x / cap) are 1-Lipschitz, and |cap tanh(g / cap)| <= |g|
   keeps SiLU's 1.1 for the capped gate; a capped u is evaluated too: s_u + EVALUATION u |u|. EVALUATION
   counts the roundings inside exp, tanh or erf and around them; it is relative to |g| and not to |act(g)|
   because 1 + tanh cancels for negative g.
3. h rounded for bf16 dots:       s_h^2 += (u_bf16 |h|)^2
4. v = Wd h + b, F products:      as 1, with s_h carried through |Wd|^2
5. y = sum over k of w_k v_k:     s_y^2 = sum (w s_v)^2 + (K + 2) (u sum |w| |v|)^2
6. y rounded to out:              error = CONFIDENCE s_y + u_out (|y| + CONFIDENCE s_y) + half a subnormal
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hostcompute import ActivationKind, ExpertSpec
from hostcompute.backends.reference import activate

F64 = npt.NDArray[np.float64]

UNIT = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
HALF_SUBNORMAL = {"f32": 2.0**-150, "f16": 2.0**-25, "bf16": 2.0**-134}
EVALUATION = 4
CONFIDENCE = 6
# VDPBF16PS and the tiles read subnormals as zero: every product may lose this much.
FLUSHED = 2.0**-126

_SLOPE = {
    ActivationKind.SILU: 1.1,
    ActivationKind.SWIGLU_CLAMP: 1.1,
    ActivationKind.SWIGLU_ALPHA: 1.1,
    ActivationKind.SWIGLU_POST_CLAMP: 1.1,
    ActivationKind.SWIGLU_SOFTCAP: 1.1,
    ActivationKind.GELU_TANH: 1.13,
    ActivationKind.GELU_ERF: 1.13,
    ActivationKind.RELU: 1.0,
}


@dataclass(frozen=True)
class Approximate:
    """Values and the deviation of a computed twin from them."""

    value: F64
    deviation: F64


@dataclass(frozen=True)
class Expected:
    """The oracle's y_TD and how far a correct answer may be from it."""

    value: F64
    error: F64


def rounded_to_bf16(x: Approximate) -> Approximate:
    """Step 3, and x in step 1."""
    return Approximate(
        x.value, np.hypot(x.deviation, UNIT["bf16"] * np.abs(x.value)) + HALF_SUBNORMAL["bf16"]
    )


def linear(weight_NK: F64, x_TK: Approximate, bias_N: F64 | float) -> Approximate:
    """Steps 1 and 4."""
    num_inputs = weight_NK.shape[1]
    value = x_TK.value @ weight_NK.T + bias_N
    carried = np.sqrt(x_TK.deviation**2 @ (weight_NK**2).T)
    largest = np.abs(x_TK.value) @ np.abs(weight_NK.T) + np.abs(bias_N)
    summed = np.sqrt(num_inputs + 2) * UNIT["f32"] * largest
    flushed = FLUSHED * (num_inputs + np.abs(x_TK.value).sum(1, keepdims=True))
    return Approximate(value, np.hypot(carried, summed) + flushed)


def activated(spec: ExpertSpec, g: Approximate, u: Approximate | None) -> Approximate:
    """Step 2. An ungated expert multiplies by an exact 1."""
    activation = spec.activation
    value = activate(activation, g.value, None if u is None else u.value)
    if u is None:
        factor, factor_deviation = np.ones_like(g.value), np.zeros_like(g.value)
    else:
        factor, factor_deviation = u.value, u.deviation
        if activation.kind is ActivationKind.SWIGLU_SOFTCAP:
            factor = activation.limit * np.tanh(u.value / activation.limit)
            factor_deviation = factor_deviation + EVALUATION * UNIT["f32"] * np.abs(factor)
        elif activation.kind.needs_gate:
            factor = np.clip(u.value, -activation.limit, activation.limit)
        if activation.kind is ActivationKind.SWIGLU_ALPHA:
            factor, factor_deviation = factor + 1, factor_deviation + UNIT["f32"]
    magnitude = np.abs(g.value) + g.deviation
    if activation.kind is ActivationKind.RELU2:
        slope, act = 2 * magnitude, magnitude**2
    else:
        slope, act = _SLOPE[activation.kind], magnitude  # |act(g)| <= |g| for all of them
    largest_factor = np.abs(factor) + factor_deviation
    deviation = slope * g.deviation * largest_factor + act * factor_deviation
    return Approximate(value, deviation + EVALUATION * UNIT["f32"] * act * largest_factor)


def forward_bound(
    spec: ExpertSpec,
    experts: dict[int, dict[str, F64]],
    x_TD: F64,
    ids_TK: npt.NDArray[np.int64],
    weights_TK: F64,
    out_dtype: str,
    bf16_dots: bool,
) -> Expected:
    """The oracle's y_TD and the bound on every element. `experts` holds the stored weights as float64."""
    y_TD, variance_TD, largest_TD = np.zeros_like(x_TD), np.zeros_like(x_TD), np.zeros_like(x_TD)
    x = Approximate(x_TD, np.zeros_like(x_TD))
    x = rounded_to_bf16(x) if bf16_dots else x
    for expert_id in {int(e) for e in ids_TK.ravel()} & set(range(spec.num_experts)):
        weight_TK = np.where(ids_TK == expert_id, weights_TK, 0)
        if not weight_TK.any():
            continue
        matrices = experts[expert_id]
        u = linear(matrices["up"], x, matrices.get("up_bias", 0.0))
        g = linear(matrices["gate"], x, matrices.get("gate_bias", 0.0)) if spec.gated else None
        h = activated(spec, u if g is None else g, None if g is None else u)
        h = rounded_to_bf16(h) if bf16_dots else h
        v = linear(matrices["down"], h, matrices.get("down_bias", 0.0))
        weight_T1 = weight_TK.sum(1, keepdims=True)
        y_TD += weight_T1 * v.value
        variance_TD += (weight_T1 * v.deviation) ** 2
        largest_TD += np.abs(weight_TK).sum(1, keepdims=True) * np.abs(v.value)
    variance_TD += (ids_TK.shape[1] + 2) * (UNIT["f32"] * largest_TD) ** 2
    error_TD = CONFIDENCE * np.sqrt(variance_TD)
    error_TD += UNIT[out_dtype] * (np.abs(y_TD) + error_TD) + HALF_SUBNORMAL[out_dtype]
    return Expected(y_TD, error_TD)


def assert_within(actual_TD: npt.NDArray[np.floating], expected: Expected, what: str) -> None:
    """Every element within its bound; the failure names the worst one and where it is."""
    assert actual_TD.shape == expected.value.shape
    if actual_TD.size == 0:
        return
    difference = np.abs(actual_TD.astype(np.float64) - expected.value)
    ratio = np.where(np.isnan(difference), np.inf, difference / expected.error)
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    assert ratio[worst] <= 1, (
        f"{what}: y{[int(i) for i in worst]} is {actual_TD[worst]}, expected {expected.value[worst]} "
        f"+- {expected.error[worst]:.3g}: {ratio[worst]:.3g} times the bound"
    )
