"""Whatever happens to one rank, every other gets one clear error in a stated time."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hostcompute import DType, ExpertSpec
from monde.device.notices import ANSWER_S, Notice
from monde.executors.ranked_batch import exchange_batch
from monde.executors.ranks import RankError, RankGroup
from monde.executors.sharded import ShardedExecutor
from tests.distributed.moe import Case, compute_of, slices
from tests.distributed.ranks import run_ranks

TIMEOUT_S = 3.0
CASE = Case(ExpertSpec(3, 16, 32, DType.F32), (5, 9, 0, 2), 2)


def step(ranks: RankGroup, layer_idx: int = 0, num_topk: int = 2) -> None:
    part = slices(CASE.spec, tuple(32 * w // ranks.size for w in range(ranks.size + 1)))[ranks.rank]
    batch = Case(CASE.spec, CASE.num_tokens_W, num_topk).batch(ranks.rank)
    home_E1 = torch.tensor([0, 0, 1, ranks.size])
    ranked = exchange_batch(ranks, layer_idx, batch, home_E1, 3)
    ShardedExecutor(ranks, compute_of(part, CASE.experts(), "reference")).forward(ranked, num_chunks=2)


def struck(how: str) -> tuple[str, float]:
    """What this rank was told, and after how many seconds, when rank 1 misbehaves in the second step."""
    ranks = RankGroup(init_device_mesh("cpu", (dist.get_world_size(),)), TIMEOUT_S)
    step(ranks)
    odd_one = ranks.rank == 1
    start_s = time.perf_counter()
    try:
        if odd_one and how == "die":
            os._exit(1)
        if odd_one and how == "late":
            time.sleep(2 * TIMEOUT_S)
        step(
            ranks,
            layer_idx=4 if odd_one and how == "layer" else 3,
            num_topk=3 if odd_one and how == "topk" else 2,
        )
    except RankError as error:
        told = str(error)
        if how in ("die", "late"):  # and it stays so, at once
            with pytest.raises(RankError, match="lost the others"):
                step(ranks)
        return told, time.perf_counter() - start_s
    return "", 0.0


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("die", "lost the others .* restart all ranks"),
        ("late", "lost the others .* mesh_timeout_s"),
        ("layer", r"different calls, layer by rank: \[3, 4"),
        ("topk", r"different calls, top-k by rank: \[2, 3"),
    ],
)
def test_all_ranks_hear_of_it_in_time(tmp_path: Path, num_ranks: int, how: str, message: str) -> None:
    told = run_ranks(struck, num_ranks, tmp_path, how, may_die=(1,) if how == "die" else ())
    for rank, heard in enumerate(told):
        if rank == 1 and how == "die":
            assert heard is None
            continue
        error, seconds_s = heard
        assert "\n" not in error
        assert re.search(message, error), (rank, error)
        assert seconds_s < 3 * TIMEOUT_S + 2, (rank, seconds_s)


def silent_store() -> list[float]:
    """Seconds of looks and of giving notice while the store does not answer, and of a look once it does."""
    ranks = RankGroup(init_device_mesh("cpu", (dist.get_world_size(),)), TIMEOUT_S)
    notices, took_s = ranks._notices, []
    assert notices is not None
    answers, store = threading.Event(), notices._store

    class Silent:
        def add(self, *_: object) -> int:
            answers.wait(30)
            return 0

        def set(self, *_: object) -> None:
            answers.wait(30)

    def timed(action: Callable[[], object]) -> object:
        start_s = time.perf_counter()
        found = action()
        took_s.append(time.perf_counter() - start_s)
        return found

    notices._store = Silent()
    assert timed(lambda: notices.of_others(2)) == []
    assert timed(lambda: notices.of_others(2)) == []
    timed(lambda: notices.post(Notice(None, ranks.rank, "nobody hears it")))
    answers.set()
    assert notices._asking is not None
    notices._asking.join()
    notices._store = store
    notices.post(Notice(None, ranks.rank, "heard"))
    ranks.agree()
    told = timed(lambda: notices.of_others(2))
    assert told == [Notice(None, 1 - ranks.rank, "heard")]
    return took_s


def test_a_store_that_does_not_answer_holds_nobody_up(tmp_path: Path) -> None:
    """It may lie beyond the link that is dead, and knows no time limit."""
    for first_s, second_s, post_s, last_s in run_ranks(silent_store, 2, tmp_path):
        assert ANSWER_S <= first_s < ANSWER_S + 1
        assert second_s < 0.5, "a look waits while another is unanswered"
        assert ANSWER_S <= post_s < ANSWER_S + 1
        assert last_s < 0.5


def disagree(how: str) -> str:
    ranks = RankGroup(init_device_mesh("cpu", (dist.get_world_size(),)), TIMEOUT_S)
    try:
        with ranks.together():
            if ranks.rank == 1:
                raise FileNotFoundError("shard 2 of 3 is missing; copy it here")
            if how == "meet":
                ranks.agree()
    except (RankError, FileNotFoundError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("how", ["meet", "end"])
def test_an_error_on_one_rank_reaches_all(tmp_path: Path, how: str) -> None:
    told = run_ranks(disagree, 3, tmp_path, how)
    missing = "shard 2 of 3 is missing; copy it here"
    assert told == [f"mesh: rank 1: {missing}", missing, f"mesh: rank 1: {missing}"]
