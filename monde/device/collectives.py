"""Collectives of rows, started and waited for: an uneven all-to-all, posted as the backend needs it, and a gather."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames it and warns of the old name, which is the only one before.
_all_gather: Callable[..., dist.Work | None] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def start_all_gather(
    y_SD: Tensor, x_RD: Tensor, group: dist.ProcessGroup | None = None
) -> Callable[[], None]:
    """The rows of all ranks of `group`, as many from each, in the order of ranks."""
    work = _all_gather(y_SD, x_RD, group=group, async_op=True)
    assert work is not None, "this rank is no member of the group"

    def wait() -> None:
        work.wait()

    return wait


def start_all_to_all(
    y_SD: Tensor, x_RD: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup
) -> Callable[[], None]:
    """Rows of x_RD to the ranks of `group`, sent[i] to rank i in order; received[i] from rank i into y_SD.

    Both contiguous; neither may be touched before the returned function has been called. On devices with streams
    it makes the current stream wait instead of the caller.
    """
    if dist.get_backend(group) != dist.Backend.GLOO:
        collective = dist.all_to_all_single(
            y_SD, x_RD, list(received), list(sent), group=group, async_op=True
        )
        assert collective is not None, "this rank is no member of the group"

        def wait_for_collective() -> None:
            collective.wait()

        return wait_for_collective
    # Gloo's own all-to-all posts sends before receives. A receive is announced over the connection that a send may
    # already fill, so two ranks with much for each other take turns: half the speed of a full-duplex link.
    me = dist.get_rank(group)
    into, out_of = y_SD.split(list(received)), x_RD.split(list(sent))
    others = [i for i in range(len(sent)) if i != me]
    works = [dist.irecv(into[i], group=group, group_src=i) for i in others if received[i]]
    works += [dist.isend(out_of[i], group=group, group_dst=i) for i in others if sent[i]]
    if sent[me]:
        into[me].copy_(out_of[me])

    # Messages to one rank, unlike collectives, keep the limit with which the group was made; take the one set since.
    limit = group._get_backend(x_RD.device).options._timeout

    def wait() -> None:
        for work in works:
            assert work is not None, "this rank is no member of the group"
            work.wait(limit)

    return wait
