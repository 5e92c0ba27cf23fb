"""Decode: which share of every cold expert's F the GPU reads straight from host memory (zero-copy).

The host computes the rows of F that remain; both start together, so the share is right when both end together.
`best_share` is the closed form from a profile; `ShareController` corrects it from the times of real steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from monde.planning.profile import Overlap


@dataclass(frozen=True)
class Share:
    """share of F on the GPU, and when each side is done."""

    share: float
    gpu_s: float
    host_s: float

    @property
    def step_s(self) -> float:
        return max(self.gpu_s, self.host_s)


def best_share(
    gpu_s: float, host_s: float, overlap: Overlap, gpu_lead_s: float = 0.0, host_lead_s: float = 0.0
) -> Share:
    """The share x in [0, 1] of least step_s = max(gpu_lead_s + x G, host_lead_s + (1 - x) H).

    gpu_s, host_s: all cold experts of the step on one side alone, by zero-copy or on the host. The leads are what a
    side does besides: resident experts, the round trip. G and H are slowed by `overlap` (host, GPU) where both take
    part, and as given where one does all. Both ends and the balance x = (host_lead + H - gpu_lead) / (G + H) are
    compared: at the ends nobody is slowed, and the host's lead vanishes when it has nothing to do.
    """
    all_host = Share(0.0, gpu_lead_s, host_lead_s + host_s)
    all_gpu = Share(1.0, gpu_lead_s + gpu_s, 0.0)
    slow_host_s, slow_gpu_s = host_s * overlap.first, gpu_s * overlap.second
    balance_s = host_lead_s + slow_host_s - gpu_lead_s
    if not 0 < balance_s < slow_host_s + slow_gpu_s:
        return min(all_host, all_gpu, key=lambda s: s.step_s)
    x = balance_s / (slow_host_s + slow_gpu_s)
    both = Share(x, gpu_lead_s + x * slow_gpu_s, host_lead_s + (1 - x) * slow_host_s)
    return min(all_host, both, all_gpu, key=lambda s: s.step_s)


def rows_of(share: float, d_ffn: int, granule: int) -> int:
    """Rows of F nearest to `share`, a multiple of `granule` or all of F."""
    rows = round(share * d_ffn / granule) * granule
    return min(rows, d_ffn)


class ShareController:
    """Keeps a share balanced from the seconds both sides took; knows nothing of their causes.

    Every step gives an estimate of what the whole of F would take on each side, whatever its share was. Disturbances
    only ever make steps longer, so the lower third of the last `window` counts, on both sides alike. From the
    `fewest`-th step on the share moves whenever balance would save more than `hysteresis` of the step. That is little: a
    GPU with a quarter of F may wait for a fifth of its time before the step could be 5% shorter. It stays within
    [min_share, 1 - min_share], because a side without work cannot be measured.
    """

    def __init__(
        self, share: float, *, min_share: float, hysteresis: float = 0.02, window: int = 24, fewest: int = 12
    ) -> None:
        if not 0 < min_share < 0.5:
            raise ValueError(f"ShareController: expected min_share in (0, 0.5), got {min_share}")
        self._min, self._hysteresis, self._fewest = min_share, hysteresis, fewest
        self.share = self._clip(share)
        self._whole_s: deque[tuple[float, float]] = deque(maxlen=window)

    def update(self, gpu_s: float, host_s: float) -> float:
        """Take in one step at the current share; returns the share of the next.

        Errors: ValueError for times that are not positive.
        """
        if not (gpu_s > 0 and host_s > 0):
            raise ValueError(f"ShareController: expected seconds above 0, got GPU {gpu_s} and host {host_s}")
        self._whole_s.append((gpu_s / self.share, host_s / (1 - self.share)))
        if len(self._whole_s) >= self._fewest:
            third = len(self._whole_s) // 3
            whole_gpu_s = sorted(gpu for gpu, _ in self._whole_s)[third]
            whole_host_s = sorted(host for _, host in self._whole_s)[third]
            now_s = max(self.share * whole_gpu_s, (1 - self.share) * whole_host_s)
            balanced = self._clip(whole_host_s / (whole_gpu_s + whole_host_s))
            then_s = max(balanced * whole_gpu_s, (1 - balanced) * whole_host_s)
            if then_s < now_s * (1 - self._hysteresis):
                self.share = balanced
        return self.share

    def _clip(self, share: float) -> float:
        return min(max(share, self._min), 1 - self._min)
