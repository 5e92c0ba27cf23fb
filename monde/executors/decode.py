"""A layer's few tokens on GPU and host at once, with nothing that waits on the CPU's side.

Four kernels a layer (monde/device/kernels/decode.cu): route and ring, gate-up and down of the residents, and of a
part of every other expert, while the host computes what is left of those, combine. All of it is plain launches on the
current stream, so a CUDA graph can hold it.
Letters as in monde.core.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hostcompute import DType, ExpertBank, ExpertSpec, make_layout
from hostcompute.backends.select import BackendChoice
from hostcompute.doorbell import Doorbell, MailboxAddresses
from monde.core import RoutedBatch
from monde.device.kernels import (
    ACTIVATION_CODES,
    ELEMENT_TYPES,
    MAX_EXPERTS,
    STATE_WORDS,
    DecodeKernels,
    decode_kernels,
)
from monde.device.layer_record import LAYER
from monde.device.mailbox import DecodeScratch, DecodeSize, Mailbox
from monde.device.streams import current_stream
from monde.executors.deferral import Deferred, Left
from monde.executors.host import HostTotals
from monde.executors.zero_copy import ShareBalance, can_read_from_host
from monde.weights.host import HostBlobs
from monde.weights.packing import TORCH_DTYPES
from monde.weights.slots import ExpertSlots
from monde.weights.table import SlotTable

MAX_DECODE_TOKENS = 64  # above, splitting by counts and grouped products are worth a look at the counts
MAX_DECODE_TOPK = 32
DEADLINE_S = 10.0  # the slowest answer of a healthy host takes tens of milliseconds
_THREADS = 256  # kThreads of decode.cu
_HOST_DTYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F16}


class DecodeHub:
    """What the layers of one model share for one type of activations: mailbox, scratch, and the host's thread."""

    def __init__(
        self,
        specs: Sequence[ExpertSpec],
        banks: Sequence[ExpertBank],
        x_dtype: torch.dtype,
        device: torch.device,
        pool: object,
        deadline_s: float = DEADLINE_S,
        share: float = 0.0,
    ) -> None:
        """share: of F of cold experts, where the GPU's part starts from if layers let it read host memory."""
        size = DecodeSize.of(specs, MAX_DECODE_TOKENS, MAX_DECODE_TOPK)
        self.x_dtype, self.device, self.deadline_s = x_dtype, device, deadline_s
        self.scratch, self.mailbox = DecodeScratch(size, device, deadline_s), Mailbox(size)
        self.banks, self.d_model = banks, size.d_model
        self.num_ringing = 0  # layers that ring in every step
        self.is_captured = False  # a CUDA graph holds a step
        names = (field.name for field in dataclasses.fields(MailboxAddresses))
        places = MailboxAddresses(**{name: self.mailbox.addresses[name] for name in names})
        self.doorbell = Doorbell(banks, places, _HOST_DTYPES[x_dtype], pool, memory=self.mailbox.memory)
        self._first_share = share
        self._fewest_panels = sys.maxsize  # of F, of the layers whose experts the GPU reads from the host
        self.balance: ShareBalance | None = None
        self._left: weakref.ref[Left] | None = None  # by the layer launched last, while somebody wants it

    def read_from_host(self, num_f_panels: int) -> None:
        """A layer of so many panels of F lets the GPU read its experts on the host."""
        self._fewest_panels = min(self._fewest_panels, num_f_panels)
        share = self._first_share if self.balance is None else self.balance.share
        self.balance = ShareBalance(
            share, self._fewest_panels, self.scratch.state, self.mailbox, self.doorbell
        )

    def begin_step(self) -> None:
        """Before a step of the model. Errors: as check."""
        self.check()
        if self.balance is not None:
            self.balance.step()

    def check(self) -> None:
        """Errors: RuntimeError naming the layer that got no answer from the host; the next call works again.

        Reads a word of host memory: no synchronisation unless something did fail.
        """
        layer_idx = self.mailbox.failed_layer
        if layer_idx is None:
            return
        torch.cuda.synchronize(self.device)
        what = self.doorbell.error or f"the host did not answer within {self.deadline_s:g} s"
        self.doorbell.reset()
        for name in ("FAILED", "LEFT_RING"):
            self.scratch.state[STATE_WORDS.index(name)] = 0
        self.mailbox.clear_failure()
        raise RuntimeError(f"monde: MoE layer {layer_idx}: {what}; the step's output is NaN, call again")

    def before_replay(self) -> None:
        """Call it before a CUDA graph that holds a step of the whole model runs."""
        if self.is_captured:
            self.follow(None)
            self.doorbell.expect(self.num_ringing)

    def follow(self, earlier: Left | None) -> bool:
        """Launches are about to follow which take `earlier`; whether the host's part of it is still in the mailbox.

        That lasts until the next layer, so what another thread's step left is collected first.
        """
        latest = None if self._left is None else self._left()
        self._left = None
        if latest is not None and latest is not earlier:
            latest.whole_TD()
        return latest is not None and latest is earlier and latest.collect is not None

    def leave(self, left: Left) -> None:
        """What was launched last leaves this."""
        self._left = weakref.ref(left)

    def count(self, name: str) -> int:
        """A counter of the device's state; synchronises."""
        return int(self.scratch.state[STATE_WORDS.index(name)].item())

    def totals(self) -> HostTotals:
        """What crossed the bus and what the host did; synchronises."""
        host = self.doorbell.totals
        row_bytes = self.d_model * self.x_dtype.itemsize
        num_pairs = self.count("COLD_PAIRS") + self.count("RESIDENT_PAIRS")
        return HostTotals(
            num_pairs=host.num_pairs,
            weight_bytes=host.weight_bytes,
            h2d_bytes=self.count("ANSWERED_TOKENS") * self.d_model * 4 + self.count("SHARED_BYTES"),
            d2h_bytes=self.count("POSTED_TOKENS") * row_bytes + 8 * num_pairs,
            busy_s=host.busy_s,
        )

    def reset_totals(self) -> None:
        self.doorbell.reset_totals()
        for name in ("COLD_PAIRS", "RESIDENT_PAIRS", "POSTED_TOKENS", "ANSWERED_TOKENS", "SHARED_BYTES"):
            self.scratch.state[STATE_WORDS.index(name)] = 0

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        self.doorbell.close()


class DecodeExecutor:
    """One layer's share of a hub. Takes batches of at most MAX_DECODE_TOKENS tokens."""

    def __init__(
        self,
        layer_idx: int,
        spec: ExpertSpec,
        slots: ExpertSlots | None,
        table: SlotTable,
        heat_E: Tensor,
        hub: DecodeHub,
        host: HostBlobs | None = None,
    ) -> None:
        """host: the layer's experts in pinned host memory, for the GPU to read a part of the cold ones."""
        assert spec.num_experts <= MAX_EXPERTS, spec.num_experts
        self.hub, self.spec, self.slots = hub, spec, slots
        self.layout = make_layout(spec)
        self.rings = slots is None or slots.num_slots < spec.num_experts
        hub.num_ringing += self.rings
        self._host = host if can_read_from_host(spec, hub.x_dtype) else None
        if self._host is not None:
            hub.read_from_host(self.layout.num_f_panels)
        self._table, self._heat_E = table, heat_E
        self._record = LAYER.of(self._fields(layer_idx))
        self._kernels: DecodeKernels = decode_kernels(hub.x_dtype, TORCH_DTYPES[spec.dtype])

    @staticmethod
    def takes(batch: RoutedBatch) -> bool:
        num_tokens, num_topk = batch.topk_ids_TK.shape
        return (
            batch.x_TD.is_cuda
            and 0 < num_tokens <= MAX_DECODE_TOKENS
            and 0 < num_topk <= MAX_DECODE_TOPK
            and batch.x_TD.dtype in ELEMENT_TYPES
        )

    def forward(self, batch: RoutedBatch) -> Tensor:
        """y_TD like x_TD, every pair computed, summed in fp32, rounded once. No synchronisation."""
        return self.forward_deferring(batch, 0, None).y_TD

    def forward_deferring(self, batch: RoutedBatch, num_left: int, earlier: Left | None) -> Deferred:
        """As forward, but the num_left lightest pairs of every token are left, and what the layer before left is added."""
        x_TD = batch.x_TD.contiguous()
        ids_TK, weights_TK = batch.topk_ids_TK.long().contiguous(), batch.topk_weights_TK.contiguous()
        if weights_TK.dtype not in ELEMENT_TYPES:
            weights_TK = weights_TK.float()
        weights_type = ELEMENT_TYPES[weights_TK.dtype]
        num_tokens, num_topk = ids_TK.shape
        y_TD = torch.empty_like(x_TD)
        left = None
        if num_left:
            left = Left(torch.empty(x_TD.shape, dtype=torch.float32, device=x_TD.device), self._collect)
        # A graph's layers follow each other whatever other threads launch while it is captured.
        if torch.cuda.is_current_stream_capturing():
            self.hub.is_captured = True
            is_owed = earlier is not None and earlier.collect is not None
        else:
            is_owed = self.hub.follow(earlier)
            if left is not None:
                self.hub.leave(left)
            if self.rings:
                self.hub.doorbell.expect(1)
        taken = leaves = 0
        if earlier is not None:
            taken = (earlier.sum_TD if is_owed else earlier.whole_TD()).data_ptr()
        if left is not None:
            leaves = left.sum_TD.data_ptr()
        record, block = self._record, (_THREADS,)
        ids, weights, x, y = (t.data_ptr() for t in (ids_TK, weights_TK, x_TD, y_TD))
        with current_stream(self.hub.device):
            self._kernels.route(
                (_blocks(num_tokens * self.layout.d_pad_k // 8),),
                block,
                (record, x, ids, weights, *map(_int, (weights_type, num_tokens, num_topk, num_left))),
            )
            num_places = self._num_slots + (0 if self._host is None else self.spec.num_experts)
            if num_places:
                num_groups = min(num_tokens * num_topk, num_places)
                num_blocks = (
                    self.layout.num_f_panels if self.spec.gated else -(-self.layout.num_f_panels // 2)
                )
                self._kernels.gate_up((num_blocks, num_groups), block, (record, _int(num_topk)))
                self._kernels.down((-(-self.layout.num_d_panels // 2), num_groups), block, (record,))
            self._kernels.combine(
                (_blocks(self.spec.d_model), num_tokens),
                block,
                (record, weights, _int(weights_type), y, _int(num_topk), taken, _int(is_owed), leaves),
            )
        return Deferred(y_TD, left)

    def _collect(self, left_TD: Tensor) -> None:
        """Add what the host owes to what this layer left, as long as no layer was launched since."""
        num_tokens, d_model = left_TD.shape
        with current_stream(self.hub.device):
            self._kernels.collect(
                (_blocks(d_model), num_tokens), (_THREADS,), (self._record, left_TD.data_ptr())
            )

    @property
    def _num_slots(self) -> int:
        return 0 if self.slots is None else self.slots.num_slots

    def _fields(self, layer_idx: int) -> dict[str, int | float]:
        spec, layout, slots = self.spec, self.layout, self.slots
        biases = {} if slots is None else slots.biases
        places = None if self._host is None else self._host.place_of_expert_E
        names = {"gate_bias": "gate_bias_SF", "up_bias": "up_bias_SF", "down_bias": "down_bias_SD"}
        return {
            "layer_idx": layer_idx,
            "num_experts": spec.num_experts,
            "num_slots": self._num_slots,
            "d_model": spec.d_model,
            "d_ffn": spec.d_ffn,
            "gated": int(spec.gated),
            "activation": ACTIVATION_CODES[spec.activation.kind],
            "limit": spec.activation.limit,
            "alpha": spec.activation.alpha,
            "d_pad_k": layout.d_pad_k,
            "f_pad_k": layout.f_pad_k,
            "num_f_panels": layout.num_f_panels,
            "num_d_panels": layout.num_d_panels,
            "in_panel_bytes": layout.in_panel_bytes,
            "in_unit_bytes": layout.in_unit_bytes,
            "down_panel_bytes": layout.down_panel_bytes,
            "down_offset_bytes": layout.down_offset_bytes,
            "slot_of_expert_E": self._table.slot_of_expert_E1.data_ptr(),
            "blobs_SB": 0 if slots is None else slots.blobs_SB.data_ptr(),
            "blob_bytes": layout.weight_bytes,
            "host_blobs": 0 if self._host is None else self._host.address,
            "host_blob_bytes": layout.blob_bytes,
            "place_of_expert_E": 0 if places is None else places.data_ptr(),
            "heat_E": self._heat_E.data_ptr(),
            **{field: biases[role].data_ptr() if role in biases else 0 for role, field in names.items()},
            **self.hub.scratch.addresses,
            "rings": int(self.rings),
            **{f"mailbox_{name}": address for name, address in self.hub.mailbox.addresses.items()},
        }


def _blocks(num_threads: int) -> int:
    return max(1, -(-num_threads // _THREADS))


def _int(value: int) -> np.int32:
    return np.int32(value)


def why_not_decode(device: torch.device, host: BackendChoice) -> str:
    """Why GPU and host cannot decode without Python in between; empty if they can."""
    if device.type != "cuda":
        return "the model runs on the CPU"
    if host.name != "native":
        return f"the host computes with {host.name} ({host.why}), only the native backend answers a GPU"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed; pip install monde[cuda13] or monde[cuda12]"
    return ""
