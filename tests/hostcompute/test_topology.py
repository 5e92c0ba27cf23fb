"""Processes of one machine divide its cores."""

from __future__ import annotations

import math

import pytest

from hostcompute import topology
from hostcompute.topology import Core, CoreShare, choose_cores


def shares(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, num_processes: int, quota: float
) -> list[list[int]]:
    monkeypatch.setattr(topology, "allowed_cores", lambda: [Core(i, i // 4) for i in range(num_cores)])
    monkeypatch.setattr(topology, "quota_cpus", lambda: quota)
    return [
        [core.cpu_id for core in choose_cores(None, CoreShare(i, num_processes))]
        for i in range(num_processes)
    ]


@pytest.mark.parametrize(("num_cores", "num_processes"), [(8, 1), (8, 2), (8, 3), (3, 2), (5, 5)])
def test_every_core_is_in_one_share(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, num_processes: int
) -> None:
    cores_of = shares(monkeypatch, num_cores, num_processes, math.inf)
    assert [cpu_id for cores in cores_of for cpu_id in cores] == list(range(num_cores))
    assert max(map(len, cores_of)) - min(map(len, cores_of)) <= 1


def test_more_processes_than_cores_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares(monkeypatch, 2, 5, math.inf) == [[0], [1], [0], [1], [0]]


def test_what_is_paid_for_is_divided_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(cores) for cores in shares(monkeypatch, 8, 2, 4.0)] == [2, 2]
    assert [len(cores) for cores in shares(monkeypatch, 8, 4, 2.0)] == [1] * 4


def test_a_share_has_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    shares(monkeypatch, 4, 2, math.inf)
    with pytest.raises(ValueError, match=r"num_threads: expected 1..2 .*, got 3"):
        choose_cores(3, CoreShare(0, 2))
