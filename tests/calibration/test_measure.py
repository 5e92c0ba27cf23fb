"""A small measurement of this machine, whatever it is, and where its profile is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hostcompute._native")

from hostcompute import ExpertSpec, make_pool
from monde import profile_store as store
from monde.calibration import measure
from monde.calibration.host import FORMAT_TOKENS, FORMATS, TOKENS, HostProbes, format_spec, rotating
from monde.calibration.samples import Samples
from monde.planning.formats import FORMATS as PLANNED
from monde.planning.profile import MachineIdentity

SMALL = measure.Effort(ExpertSpec(16, 64, 64), sample_s=0.002, read_bytes=1 << 24, copied_bytes=1 << 26)
NO_GPU = MachineIdentity("here", "a processor", 2, None, "0")


def test_a_machine_without_gpu_is_measured() -> None:
    told: list[str] = []
    totals: list[int] = []

    def start(num_probes: int):  # type: ignore[no-untyped-def]
        totals.append(num_probes)
        return told.append

    profile = measure.calibrate(NO_GPU, SMALL, start)
    assert totals == [len(told)]
    assert profile.machine == NO_GPU
    assert profile.gpu is None
    assert profile.host_read.x[0] == 1
    assert profile.host_expert.flops_per_s.x == TOKENS
    assert "experts of 64x64 in bf16" in profile.source
    assert {name: rate.flops_per_s.x for name, rate in profile.host_formats.items()} == {
        "fp32": FORMAT_TOKENS,
        "fp16": FORMAT_TOKENS,
    }
    assert {f"host experts in {name}, 4 tokens" for name in ("fp32", "fp16")} <= set(told)


def test_a_table_of_seconds_is_given_back_whatever_the_machine_did() -> None:
    probes = HostProbes(SMALL.spec, make_pool(1), SMALL.sample_s, SMALL.read_bytes)
    seconds = 1e-5 * np.arange(1, len(TOKENS) + 1)
    call_s = 3e-5
    samples = {
        f"host, {a} experts, {t} tokens each": Samples((call_s + a * s - 1e-7,), (call_s + a * s + 1e-7,))
        for t, s in zip(TOKENS, seconds, strict=True)
        for a in probes.few_and_more(t)
    }
    rate = probes.expert_rate(samples)
    assert probes.call_s(samples) == pytest.approx(call_s)
    flops = np.asarray(TOKENS) * 6.0 * 64 * 64
    predicted = np.maximum(SMALL.spec.expert_bytes / rate.bytes_per_s, flops / rate.flops_per_s.at(TOKENS))
    np.testing.assert_allclose(predicted, seconds, rtol=1e-9)
    probes.close()


def test_experts_that_took_no_time_beside_their_call_take_all_of_it() -> None:
    probes = HostProbes(SMALL.spec, make_pool(1), SMALL.sample_s, SMALL.read_bytes)
    samples = {
        f"host, {a} experts, {t} tokens each": Samples((1e-4,), (1e-4,))
        for t in TOKENS
        for a in probes.few_and_more(t)
    }
    assert probes.call_s(samples) == 0
    assert (np.asarray(probes.expert_rate(samples).flops_per_s.y) > 0).all()
    probes.close()


def test_every_format_that_runs_is_timed_in_its_own_type() -> None:
    probes = HostProbes(SMALL.spec, make_pool(1), SMALL.sample_s, SMALL.read_bytes)
    assert {"bf16", *FORMATS} == {f.name for f in PLANNED}
    for name, dtype in FORMATS.items():
        assert probes.formats[name].spec == format_spec(SMALL.spec, dtype)
        assert probes.formats[name].spec.dtype is dtype
        num_active, more = probes.few_and_more(4, name)
        assert num_active < more
        probes.step(4, num_active, name)()
        counts = probes.formats[name].last_counts
        assert counts is not None
        assert counts.num_pairs == 4 * num_active
    probes.close()


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_a_step_gives_every_expert_its_tokens_and_takes_turns(num_tokens: int) -> None:
    probes = HostProbes(SMALL.spec, make_pool(1), SMALL.sample_s, SMALL.read_bytes)
    num_active, more = probes.few_and_more(num_tokens)
    assert num_active < more <= SMALL.spec.num_experts
    probes.step(num_tokens, num_active)()
    counts = probes.bank.last_counts
    assert counts is not None
    assert counts.num_pairs == num_tokens * num_active
    assert num_active * num_tokens <= max(128, num_tokens)
    probes.close()


def test_rotating_goes_through_all_experts() -> None:
    seen = [set(ids.flatten().tolist()) for ids in rotating(16, 4, 3)]
    assert seen == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}]
    assert all(ids.shape == (3, 4) for ids in rotating(16, 4, 3))


def test_too_little_memory_is_said_before_anything_is_made() -> None:
    huge = dataclasses.replace(SMALL, spec=ExpertSpec(10**9, 2048, 768))
    with pytest.raises(ValueError, match=r"of host memory, .* are free; end other programs"):
        measure.calibrate(NO_GPU, huge)


def test_a_profile_is_found_again_by_its_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    machine = store.this_machine()
    assert store.load(machine) is None
    profile = dataclasses.replace(measure.calibrate(NO_GPU, SMALL), machine=machine)
    path = store.save(profile)
    assert path.is_relative_to(tmp_path)
    assert store.load(machine) == profile
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for other in ({"library_version": "0.0.1"}, {"num_cores": 99}, {"gpu": "another"}):
        assert store.load(dataclasses.replace(machine, **other)) is None  # type: ignore[arg-type]


def test_threads_by_environment_are_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONDE_NUM_THREADS", "1")
    assert store.this_machine().num_cores == 1
