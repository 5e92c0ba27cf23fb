"""Run one function on several ranks of one machine: Gloo processes with a deadline, values and errors back."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a server that has imported these and has run nothing: a fresh interpreter for each would spend
# seconds on imports.
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "transformers",
    "monde",
    "monde.models.loading",
    "monde.training",
]


class RankFailed(Exception):
    """A rank raised, died or did not answer before the deadline; the message names it."""


def run_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    folder: Path,
    *arguments: Any,
    deadline_s: float = 60.0,
    may_die: Sequence[int] = (),
) -> list[Any]:
    """`function(*arguments)` on `num_ranks` Gloo ranks with one torch thread each; what each returned, by rank.

    `function` is importable by name and returns something that pickles. Ranks in `may_die` may end without an
    answer (theirs is None). A rank that is done stays connected until all are: what others still do with it is not
    broken off. Raises RankFailed with the first traceback; no process outlives the call.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    rendezvous = folder / f"rendezvous-{time.monotonic_ns()}"
    pipes = [context.Pipe() for _ in range(num_ranks)]
    ranks = [
        context.Process(
            target=_rank_main,
            args=(function, rank, num_ranks, rendezvous, deadline_s, pipes[rank][1], arguments),
            daemon=True,
        )
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    try:
        return _answers([ours for ours, _ in pipes], deadline_s, may_die)
    finally:
        for ours, _ in pipes:
            ours.close()
        for process in ranks:
            process.join(1.0)
            if process.is_alive():
                process.kill()
                process.join()


def _answers(receivers: list[Connection], deadline_s: float, may_die: Sequence[int]) -> list[Any]:
    values: list[Any] = [None] * len(receivers)
    open_ranks = set(range(len(receivers)))
    end = time.monotonic() + deadline_s
    while open_ranks:
        ready = wait([receivers[rank] for rank in open_ranks], max(0.0, end - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(open_ranks)} gave no answer within {deadline_s:g} s")
        for rank in [rank for rank in open_ranks if receivers[rank] in ready]:
            open_ranks.discard(rank)
            try:
                error, value = receivers[rank].recv()
            except EOFError:
                if rank in may_die:
                    continue
                raise RankFailed(f"rank {rank} died") from None
            if error is not None:
                raise RankFailed(f"rank {rank}:\n{error}")
            values[rank] = value
    return values


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    num_ranks: int,
    rendezvous: Path,
    deadline_s: float,
    parent: Connection,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(rendezvous), num_ranks),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=deadline_s),
        )
        answer = (None, function(*arguments))
    except BaseException:
        answer = (traceback.format_exc(), None)
    parent.send(answer)
    wait([parent])  # until it closes its end
    if dist.is_initialized() and answer[0] is None:
        dist.destroy_process_group()
