"""Uneven all-to-alls of one chunk's rows: to the experts' node, inside it, and back.

The way forward of rows is the way of their outputs' gradients, and the way back of outputs that of the rows' gradients:
forward and backward make the same four steps. On Gloo an all-gather of uneven shards fails and a reduce-scatter is one
all-reduce a rank, so both are all-to-alls here (and a local sum), at the same volume.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from monde.device.collectives import start_all_to_all
from monde.training.fabric import Fabric
from monde.training.traffic import Chunk


def all_to_all(
    x_RD: Tensor, send_splits: list[int], recv_splits: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Rows by peer, in the order of ranks. No group: the rows themselves."""
    if group is None:
        return x_RD
    received_RD = x_RD.new_empty(sum(recv_splits), *x_RD.shape[1:])
    start_all_to_all(received_RD, x_RD.contiguous(), recv_splits, send_splits, group)()
    return received_RD


def dispatch(rows_RD: Tensor, chunk: Chunk, fabric: Fabric) -> Tensor:
    """A rank's own rows -> those of its node's experts that ranks with its local_idx had."""
    if chunk.rows_index is not None:
        rows_RD = rows_RD.index_select(0, chunk.rows_index.to(rows_RD.device))
    return all_to_all(rows_RD, chunk.send_splits_N, chunk.recv_splits_N, fabric.inter)


def gather(received_RD: Tensor, chunk: Chunk, fabric: Fabric) -> Tensor:
    """-> all rows of the node's experts, on every rank of the node, source by source."""
    num = chunk.num_received
    return all_to_all(
        received_RD.repeat(fabric.num_local, 1) if fabric.num_local > 1 else received_RD,
        [num] * fabric.num_local,
        chunk.gather_splits_L,
        fabric.intra,
    )


def scatter(parts_RD: Tensor, chunk: Chunk, fabric: Fabric) -> Tensor:
    """Every rank's part of the outputs, source by source -> the sums of the rows that this rank received."""
    num = chunk.num_received
    parts_RD = all_to_all(parts_RD, chunk.gather_splits_L, [num] * fabric.num_local, fabric.intra)
    if fabric.num_local == 1:
        return parts_RD
    sum_RD = parts_RD.view(fabric.num_local, num, parts_RD.shape[1]).sum(
        0, dtype=torch.float32 if parts_RD.dtype.itemsize < 4 else None
    )
    return sum_RD.to(parts_RD.dtype)


def combine(sums_RD: Tensor, chunk: Chunk, fabric: Fabric, into_RD: Tensor) -> None:
    """Back to where the rows came from, at their places in into_RD."""
    back_RD = all_to_all(sums_RD, chunk.recv_splits_N, chunk.send_splits_N, fabric.inter)
    if chunk.rows_index is None:
        into_RD.copy_(back_RD)
    else:
        into_RD.index_copy_(0, chunk.rows_index.to(into_RD.device), back_RD)
