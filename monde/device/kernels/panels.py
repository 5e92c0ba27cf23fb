"""panels.cu as two calls over addresses, in the form that the device has instructions for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hostcompute import ActivationKind, ExpertLayout, ExpertSpec
from monde.device.kernels import ACTIVATION_CODES, activation_source, compile_options
from monde.device.kernels.cubins import cubin
from monde.device.kernels.wgmma import wgmmas
from monde.device.record import Record

_PIECE = Record(  # what panels.cu knows of a wave's pieces
    "PieceLayout",
    """in_offset_bytes in_panel_bytes down_offset_bytes down_panel_bytes num_f_panels num_d_panels
    d_model d_pad_k f_pad_k first_row up_bias_stride down_bias_stride""".split(),  # noqa: SIM905
    ("limit", "alpha"),
)


@dataclass(frozen=True)
class Form:
    """How panels.cu is built: by mma.sync, which is sm_80's, or by wgmma, which only sm_90a has."""

    products: str  # the source of the products
    tile_rows: int  # activation rows that meet a panel at a time
    warps: int
    stages: int
    blocks_per_sm: int
    arch: str | None = None  # of wgmma; else CuPy's choice

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.tile_rows * 64 + self.warps * 2048)  # kStages times Stage

    @property
    def runs_on(self) -> bool:
        """Whether blocks stay for further items: one fills a multiprocessor, and fetches ahead from item to item."""
        return self.blocks_per_sm == 1

    def constants(self) -> str:
        return (
            f"constexpr int kTileRows = {self.tile_rows}, kPanelWarps = {self.warps}, "
            f"kStages = {self.stages}, kBlocksPerSm = {self.blocks_per_sm};"
        )


MMA = Form("panels_mma.cuh", tile_rows=128, warps=4, stages=6, blocks_per_sm=2)
# Weights are read once where an expert has up to 192 rows, as by 2048 tokens by 8 of 128 experts. More do not fit: their
# sums take 192 of 255 registers.
WGMMA = Form("panels_wgmma.cuh", 192, 8, 8, 1, "sm_90a")


def form_of(device: torch.device) -> Form | None:
    """None where there is none: older than sm_80. Newer GPUs than Hopper do without wgmma."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return None
    return WGMMA if capability == (9, 0) else MMA


class Kind(NamedTuple):
    """Of experts, as far as kernels are built for it."""

    activation: ActivationKind
    gated: bool


class Tiles(NamedTuple):
    """A wave's blocks of rows, on the device: num_tiles times int64 (bytes into what holds the pieces, first row of N,
    rows, row of the biases), see waves.tiles_of."""

    address: int
    num_tiles: int


@dataclass(frozen=True)
class PieceRecord:
    """Pieces of one layout that begin at one row of F, for the kernels that read panels. Units: pairs of panels."""

    record: npt.NDArray[np.void]
    kind: Kind
    first_row: int
    in_units: int
    down_units: int

    @classmethod
    def of(
        cls,
        spec: ExpertSpec,
        layout: ExpertLayout,
        at: Any,  # monde.executors.pieces.PackedAt
        first_row: int,
        bias_sizes: Mapping[str, int],
    ) -> PieceRecord:
        """bias_sizes: rows of a whole expert's biases, with their padding."""
        activation = spec.activation
        record = _PIECE.of(
            {
                "in_offset_bytes": at.in_offset_bytes,
                "in_panel_bytes": layout.in_panel_bytes,
                "down_offset_bytes": at.down_offset_bytes,
                "down_panel_bytes": at.down_panel_bytes,
                "num_f_panels": layout.num_f_panels,
                "num_d_panels": layout.num_d_panels,
                "d_model": spec.d_model,
                "d_pad_k": layout.d_pad_k,
                "f_pad_k": layout.f_pad_k,
                "first_row": first_row,
                "up_bias_stride": bias_sizes.get("up_bias", 0),
                "down_bias_stride": bias_sizes.get("down_bias", 0),
                "limit": activation.limit,
                "alpha": activation.alpha,
            }
        )
        in_units = layout.num_f_panels if spec.gated else -(-layout.num_f_panels // 2)
        down_units = -(-layout.num_d_panels // 2)
        return cls(record, Kind(activation.kind, spec.gated), first_row, in_units, down_units)


def panels_source(form: Form) -> str:
    def text(name: str) -> str:
        return Path(__file__).with_name(name).read_text()

    parts = [activation_source(), _PIECE.c_struct(), form.constants(), text("panels.cuh")]
    if form.arch is not None:
        parts.append(wgmmas(form.tile_rows))
    return "\n".join((*parts, text(form.products), text("panels.cu")))


def panels_options(of: Kind | None) -> tuple[str, ...]:
    """For panels_in of such experts; None: for panels_down.

    Inlined some hundred times, an activation must be one that the compiler knows.
    """
    bf16 = torch.bfloat16
    which = (
        () if of is None else (f"-DACTIVATION={ACTIVATION_CODES[of.activation]}", f"-DGATED={int(of.gated)}")
    )
    return (*compile_options(bf16, bf16), *which)


@cache
def _function(device: torch.device, form: Form, of: Kind | None) -> Any:
    """Compiled for the current device."""
    import cupy

    source, options = panels_source(form), panels_options(of)
    if form.arch is None:
        module = cupy.RawModule(code=source, options=options)
    else:
        module = cupy.RawModule(path=str(cubin(source, form.arch, options)))
    function = module.get_function("panels_down" if of is None else "panels_in")
    with torch.cuda.device(device):  # the attribute is one of a device
        function.max_dynamic_shared_size_bytes = form.shared_bytes
    return function


class Panels:
    """The products of one device."""

    def __init__(self, device: torch.device, form: Form) -> None:
        self.form, self._device = form, device
        self._sms = torch.cuda.get_device_properties(device).multi_processor_count

    def build(self, kind: Kind) -> None:
        """What such experts need: seconds at the first use, before anything is under way."""
        for of in (kind, None):
            _function(self._device, self.form, of)

    def launch(
        self,
        pieces: PieceRecord,
        tiles: Tiles,
        blobs: int,
        into_h: tuple[Any, ...],
        into_v: tuple[Any, ...],
    ) -> None:
        """Both kernels on CuPy's current stream; into_h and into_v: what follows their tiles."""
        self.launch_one(pieces.kind, pieces, pieces.in_units, tiles, blobs, into_h)
        self.launch_one(None, pieces, pieces.down_units, tiles, blobs, into_v)

    def launch_one(
        self,
        of: Kind | None,
        pieces: PieceRecord,
        units: int,
        tiles: Tiles,
        blobs: int,
        rest: tuple[Any, ...],
    ) -> None:
        """panels_in of such experts; None: panels_down."""
        num_items = tiles.num_tiles * -(-units // self.form.warps)
        _function(self._device, self.form, of)(
            (min(num_items, self._sms) if self.form.runs_on else num_items,),
            (32 * self.form.warps,),
            (pieces.record, blobs, tiles.address, np.int32(tiles.num_tiles), *rest),
            shared_mem=self.form.shared_bytes,
        )
