"""Device memory of the prefill path: part of the memory plan, and what the path keeps to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hostcompute import ExpertSpec
from hostcompute.layout import BLOB_ALIGN_BYTES, LANES
from monde.executors.pieces import piece_layout, rows_per_piece
from monde.planning.staging import Staging

# A copy of 64 MiB takes 1.2 ms on PCIe 5: a hundred times what starting one takes, and Python keeps ahead of it.
BUFFER_BYTES = 64 << 20
NUM_BUFFERS = 2  # one is filled while the other is unpacked, which takes a fiftieth of the time
# Experts unpacked at once where types have no kernel that reads panels.
SCRATCH_BYTES = 128 << 20
MAX_TOKENS = 4096  # of a chunk: every chunk moves its experts anew
MAX_PAIRS = 32768  # what the host's kernels take at once, too
BLOCK_ROWS = 4096  # rows of one of the libraries' products; bounds what hidden values take


@dataclass(frozen=True)
class LayerPieces:
    """How the experts of one layer travel and are unpacked: in pieces of piece_rows rows of F."""

    piece_rows: int
    piece_bytes: int  # of a whole piece in a buffer
    num_staged: int  # pieces of a staging buffer
    num_unpacked: int  # pieces that are unpacked at once

    @classmethod
    def of(cls, spec: ExpertSpec) -> LayerPieces:
        rows = rows_per_piece(spec, BUFFER_BYTES)
        layout = piece_layout(spec, rows)
        most = spec.num_experts * -(-spec.d_ffn // rows)
        num_staged = max(1, min(most, BUFFER_BYTES // layout.blob_bytes))
        num_unpacked = max(num_staged, min(most, SCRATCH_BYTES // layout.weight_bytes))
        return cls(rows, layout.blob_bytes, num_staged, num_unpacked)

    @property
    def buffer_bytes(self) -> int:
        return self.num_staged * self.piece_bytes

    @property
    def staging(self) -> Staging:
        return Staging(self.piece_rows, self.num_staged, NUM_BUFFERS)


@dataclass(frozen=True)
class PrefillSize:
    """The largest needs over all layers; x_bytes are those of an activation's value."""

    buffer_bytes: int
    scratch_bytes: int
    max_tokens: int
    max_pairs: int
    workspace_bytes: int

    @classmethod
    def of(cls, specs: Sequence[ExpertSpec], x_bytes: int, num_tokens: int, max_topk: int) -> PrefillSize:
        layers = [(spec, LayerPieces.of(spec)) for spec in specs]
        max_tokens = max(1, min(MAX_TOKENS, num_tokens))
        max_pairs = min(MAX_PAIRS, max_tokens * max_topk)
        d_model = max(spec.d_model for spec in specs)
        # A block: gathered inputs and results, gate and up and hidden values; torch's activations, without the
        # kernels, take four arrays of fp32 besides. Straight from panels hidden values of all pairs are kept: less.
        f16 = max(min(pieces.piece_rows, spec.d_ffn) for spec, pieces in layers) + LANES
        block_bytes = min(BLOCK_ROWS, max_pairs) * (2 * d_model * x_bytes + f16 * (3 * x_bytes + 4 * 4))
        # One result a pair, in fp32 where an expert comes in several pieces; three fp32 sums a token.
        is_whole = all(pieces.piece_rows >= spec.d_ffn for spec, pieces in layers)
        pair_bytes = d_model * (x_bytes if is_whole else 4) + 64
        workspace_bytes = block_bytes + max_pairs * pair_bytes + max_tokens * 12 * d_model
        return cls(
            max(pieces.buffer_bytes for _, pieces in layers),
            max(_scratch_bytes(spec, pieces) for spec, pieces in layers),
            max_tokens,
            max_pairs,
            workspace_bytes + max(_widened_bytes(spec, pieces, x_bytes) for spec, pieces in layers),
        )

    @property
    def fixed_bytes(self) -> int:
        """Kept from the first prompt on."""
        return NUM_BUFFERS * self.buffer_bytes + self.scratch_bytes + BLOB_ALIGN_BYTES

    def chunk_tokens(self, num_topk: int) -> int:
        return max(1, min(self.max_tokens, self.max_pairs // max(1, num_topk)))


def _scratch_bytes(spec: ExpertSpec, pieces: LayerPieces) -> int:
    """Row-major matrices of the pieces that are unpacked at once, with the padding of their panels."""
    layout = piece_layout(spec, pieces.piece_rows)
    f16, d16 = layout.num_f_panels * LANES, layout.num_d_panels * LANES
    num_values = (2 if spec.gated else 1) * f16 * layout.d_pad_k + d16 * layout.f_pad_k
    return pieces.num_unpacked * num_values * spec.dtype.itemsize_bytes


def _widened_bytes(spec: ExpertSpec, pieces: LayerPieces, x_bytes: int) -> int:
    """Weights of a narrower type than the activations, widened after unpacking."""
    item_bytes = spec.dtype.itemsize_bytes
    return _scratch_bytes(spec, pieces) // item_bytes * x_bytes if x_bytes > item_bytes else 0
