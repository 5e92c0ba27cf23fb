"""Which part of cold experts' F the GPU reads straight from the host's memory while the host computes the rest.

Host and bus read the same memory, but together they read more of it than the host alone. The part is right when both
ends finish together: it starts from the machine's profile and follows the seconds that real steps take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hostcompute import DType, ExpertSpec, make_layout
from hostcompute.doorbell import Doorbell
from monde.device.kernels import SHARE_ONE, STATE_WORDS
from monde.device.mailbox import Mailbox
from monde.planning.profile import HardwareProfile
from monde.planning.share import ShareController, best_share

MIN_PANELS = 6  # of F; fewer cannot be cut finely enough to balance anything
_GRANULE_PANELS = 2


def can_read_from_host(spec: ExpertSpec, x_dtype: torch.dtype) -> bool:
    """Whether decode's kernels can read a part of such experts in host memory."""
    in_bf16 = spec.dtype is DType.BF16 and x_dtype is torch.bfloat16
    return in_bf16 and not spec.has_bias and make_layout(spec).num_f_panels >= MIN_PANELS


def first_share(profile: HardwareProfile) -> float:
    """From the bandwidths of both sides while the other reads too."""
    gpu = profile.gpu
    assert gpu is not None
    whole_gpu_s, whole_host_s = 1 / gpu.zero_copy_bytes_per_s, 1 / profile.host_expert.bytes_per_s
    return best_share(whole_gpu_s, whole_host_s, gpu.host_while_copying).share


class ShareBalance:
    """Writes the share of F into the decode kernels' state, and corrects it between steps.

    num_f_panels: the fewest of any layer. It reads words of host memory: no synchronisation. A step that is still
    under way is counted with the next one.
    """

    def __init__(
        self, share: float, num_f_panels: int, state: Tensor, mailbox: Mailbox, doorbell: Doorbell
    ) -> None:
        self._controller = ShareController(share, min_share=_GRANULE_PANELS / num_f_panels)
        self._state, self._mailbox, self._doorbell = state, mailbox, doorbell
        self._seen_s = self._now_s()
        self._write()

    @property
    def share(self) -> float:
        return self._controller.share

    def step(self) -> None:
        """Between two steps of the model."""
        now_s = self._now_s()
        gpu_s, host_s = (now - seen for now, seen in zip(now_s, self._seen_s, strict=True))
        self._seen_s = now_s
        if gpu_s > 0 and host_s > 0:  # else nothing was cold, or the totals were reset
            before = self.share
            if self._controller.update(gpu_s, host_s) != before:
                self._write()

    def _now_s(self) -> tuple[float, float]:
        """Of GPU and host so far. Pairs that count later are the host's alone, whatever the share."""
        host = self._doorbell.totals
        return self._mailbox.gpu_s, host.busy_s - host.later_s

    def _write(self) -> None:
        self._state[STATE_WORDS.index("SHARE")] = round(self.share * SHARE_ONE)
