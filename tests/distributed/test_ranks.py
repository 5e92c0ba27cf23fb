"""The harness of the distributed tests: values come back by rank, errors and deaths name the rank, nothing hangs."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankFailed, run_ranks


def sum_of_ranks(offset: int) -> tuple[int, float]:
    x = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(x)
    return dist.get_rank(), x.item()


def fail_on_rank_1(way: str) -> None:
    if dist.get_rank() == 1:
        if way == "raise":
            raise ValueError("this rank does not want to")
        if way == "die":
            os._exit(3)
        time.sleep(30)


def test_values_by_rank(tmp_path: Path) -> None:
    assert run_ranks(sum_of_ranks, 3, tmp_path, 1) == [(0, 6.0), (1, 6.0), (2, 6.0)]


@pytest.mark.parametrize(
    ("way", "message"),
    [("raise", "does not want to"), ("die", "rank 1 died"), ("hang", r"ranks \[1\] gave no")],
)
def test_a_failing_rank_is_named(tmp_path: Path, way: str, message: str) -> None:
    with pytest.raises(RankFailed, match=message):
        run_ranks(fail_on_rank_1, 2, tmp_path, way, deadline_s=5.0)


def test_a_death_can_be_part_of_the_test(tmp_path: Path) -> None:
    assert run_ranks(fail_on_rank_1, 2, tmp_path, "die", may_die=(1,)) == [None, None]
