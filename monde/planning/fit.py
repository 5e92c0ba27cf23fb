"""From timings to two numbers: seconds = alpha_s + size * s_per_unit, whatever else the machine was doing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What differs by more is noise: it is a third of the error that plans are held to in the worst case.
NOISY_SHARE = 0.1
_POOR_R2 = 0.5
_NUM_ROUNDS = 4
_OUTLIER_MADS = 4.0  # scaled median absolute deviations of the relative error
_EXACT = 0.01  # relative errors below this are never outliers, however well the others fit


@dataclass(frozen=True)
class AlphaBeta:
    """seconds = alpha_s + size * s_per_unit; the unit is the caller's (bytes, tokens).

    r2, num_rejected and spread, the standard deviation of the seconds over their mean, tell how far to trust a fit;
    described machines keep the defaults.
    """

    alpha_s: float
    s_per_unit: float
    r2: float = 1.0
    num_rejected: int = 0
    spread: float = 0.0

    def __post_init__(self) -> None:
        if not (self.alpha_s >= 0 and self.s_per_unit >= 0):
            raise ValueError(
                f"AlphaBeta: expected alpha_s and s_per_unit of at least 0, got {self.alpha_s}, {self.s_per_unit}"
            )

    @property
    def is_poor(self) -> bool:
        """Whether size explains less than half of what the seconds do, where they do more than noise.

        What takes equally long at every size has a low r2 too, and is a good fit.
        """
        return self.r2 < _POOR_R2 and self.spread > NOISY_SHARE

    def seconds(self, size: float | NDArray[np.floating]) -> float | NDArray[np.float64]:
        """Seconds for `size` units, elementwise; nothing takes no time."""
        if isinstance(size, float | int):  # plans of a batch ask a dozen times, and arrays take 6 us each
            return float(self.alpha_s + size * self.s_per_unit) if size > 0 else 0.0
        result: NDArray[np.float64] = np.where(
            np.asarray(size) > 0, self.alpha_s + np.asarray(size) * self.s_per_unit, 0.0
        )
        return result if result.ndim else float(result)


def fit_alpha_beta(sizes: Sequence[float], seconds: Sequence[float]) -> AlphaBeta:
    """Least squares on relative errors, because sizes span decades; alpha_s and s_per_unit are at least 0.

    Starts from the median of all pairwise slopes (half of the samples may be spoilt), then drops outliers and
    fits again. r2 and spread are those of the samples kept, on seconds.
    Errors: ValueError for fewer than three samples, two equal sizes only, or timings that are not positive.
    """
    x, y = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3 or len(np.unique(x)) < 2:
        raise ValueError(
            f"fit_alpha_beta: expected at least 3 samples of at least 2 sizes, got {x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x >= 0).all() and (y > 0).all()):
        raise ValueError("fit_alpha_beta: expected sizes of at least 0 and seconds above 0; measure again")
    alpha, beta = _median_line(x, y)
    keep = np.ones(len(x), bool)
    for _ in range(_NUM_ROUNDS):
        inliers = _inliers(x, y, alpha, beta)
        if np.count_nonzero(inliers) < 3 or len(np.unique(x[inliers])) < 2:
            break
        keep = inliers
        alpha, beta = _least_squares(x[keep], y[keep])
    residual = y[keep] - (alpha + beta * x[keep])
    squares = float(np.sum((y[keep] - y[keep].mean()) ** 2))
    r2 = 1.0 - float(np.sum(residual**2)) / squares if squares > 0 else 1.0
    spread = float(y[keep].std() / y[keep].mean())
    return AlphaBeta(alpha, beta, r2, int(np.count_nonzero(~keep)), spread)


def _median_line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    i, j = np.triu_indices(len(x), k=1)
    apart = x[i] != x[j]
    slope = max(float(np.median((y[i] - y[j])[apart] / (x[i] - x[j])[apart])), 0.0)
    return max(float(np.median(y - slope * x)), 0.0), slope


def _inliers(x: NDArray[np.float64], y: NDArray[np.float64], alpha: float, beta: float) -> NDArray[np.bool_]:
    error = (y - (alpha + beta * x)) / y
    centre = np.median(error)
    scale = 1.4826 * float(np.median(np.abs(error - centre)))
    return np.asarray(np.abs(error - centre) <= max(_OUTLIER_MADS * scale, _EXACT))


def _least_squares(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """min sum(((alpha + beta x) - y) / y)^2 with both at least 0; of two unknowns, one bound at a time."""
    a, b = 1 / y, x / y  # columns of the weighted system; its right side is all ones
    aa, ab, bb, a1, b1 = a @ a, a @ b, b @ b, a.sum(), b.sum()
    det = aa * bb - ab * ab
    if det > 1e-12 * aa * bb:
        alpha, beta = (a1 * bb - b1 * ab) / det, (aa * b1 - ab * a1) / det
        if alpha >= 0 and beta >= 0:
            return float(alpha), float(beta)
        if alpha < 0:
            return 0.0, float(b1 / bb)
    return float(a1 / aa), 0.0
