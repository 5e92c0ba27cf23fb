"""From a measured profile to degrees, and noticing that it no longer holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from monde.planning.fit import AlphaBeta
from monde.planning.pipeline import Degrees, layer_timeline
from monde.planning.profile import Overlap
from monde.planning.training_profile import (
    BACKWARD,
    FORWARD,
    DegreePlanner,
    Observation,
    TrainingProfile,
    drift,
    refitted,
)

PROFILE = TrainingProfile(
    num_nodes=2, num_local=2, row_bytes=1024,
    forward=AlphaBeta(1e-4, 2e-6), backward=AlphaBeta(2e-4, 4e-6),
    inter=AlphaBeta(3e-4, 2e-9), intra=AlphaBeta(1e-4, 5e-10), all_reduce=AlphaBeta(4e-4, 1e-8),
    compute_inter=Overlap(1.2, 1.3), compute_intra=Overlap(1.1, 1.1), inter_intra=Overlap(1.2, 1.0),
)  # fmt: skip


def observed(profile: TrainingProfile, direction: str, degree: int, rows: int) -> Observation:
    """What a mesh that behaves as `profile` shows."""
    timeline = layer_timeline(profile.stages(direction, rows), degree, profile.contention)
    by_stage: dict[str, float] = {}
    for span in timeline.spans:
        stage = span.name.split()[0]
        by_stage[stage] = by_stage.get(stage, 0.0) + span.end_s - span.start_s
    return Observation(direction, degree, rows, by_stage)


def look(profile: TrainingProfile, rows: int = 4096) -> list[Observation]:
    return [observed(profile, way, 3, rows) for way in (FORWARD, BACKWARD) for _ in range(4)]


def test_work_of_a_balanced_load() -> None:
    stages = PROFILE.stages(FORWARD, 4000)
    assert stages.experts.work_s == pytest.approx(4000 * 2e-6)
    assert stages.dispatch is not None
    assert stages.dispatch.work_s == pytest.approx(
        2000 / 2 * 1024 * 2e-9
    )  # half of a rank's rows change nodes
    assert stages.gather is not None
    assert stages.gather.work_s == pytest.approx(
        2000 * 1024 * 5e-10
    )  # half of a node's rows are another rank's


def test_interference_is_not_drift() -> None:
    ratios = drift(PROFILE, look(PROFILE))
    assert set(ratios) == {FORWARD, BACKWARD, "inter", "intra"}
    assert all(ratio == pytest.approx(1.0) for ratio in ratios.values())


def test_a_slower_link_is_found_and_degrees_follow() -> None:
    # Rows bring the layer from compute bound to link bound when the link is ten times slower.
    slow = replace(PROFILE, inter=AlphaBeta(3e-3, 2e-8))
    planner = DegreePlanner(PROFILE, num_observed=8)
    before = planner(4096)
    assert not planner.observe(look(PROFILE))
    assert planner.observe(look(slow))
    assert planner.num_refits == 1
    assert planner.profile.inter is not None
    assert planner.profile.inter.s_per_unit == pytest.approx(
        2e-8, rel=0.3
    )  # its tasks overlap less with others now
    assert planner.profile.forward == PROFILE.forward
    assert planner(4096) == DegreePlanner(planner.profile)(4096)
    assert planner(4096) != before


def test_a_second_look_settles() -> None:
    slow = replace(PROFILE, inter=AlphaBeta(3e-3, 2e-8), forward=AlphaBeta(3e-4, 6e-6))
    planner = DegreePlanner(PROFILE)
    for _ in range(4):
        planner.observe(look(slow))
    assert planner.num_refits in (1, 2)
    assert all(r == pytest.approx(1.0, abs=0.25) for r in drift(planner.profile, look(slow)).values())


def test_one_late_stage_is_no_drift() -> None:
    seen = look(PROFILE)
    late = dict(seen[0].seconds_s)
    late["dispatch"] *= 50
    seen[0] = replace(seen[0], seconds_s=late)
    assert not DegreePlanner(PROFILE).observe(seen)


def test_few_observations_wait_for_more() -> None:
    planner = DegreePlanner(PROFILE, num_observed=8)
    assert not planner.observe(look(replace(PROFILE, forward=AlphaBeta(1e-2, 1e-4)))[:7])
    assert planner.num_refits == 0


def test_another_load_has_degrees_of_its_own() -> None:
    planner = DegreePlanner(PROFILE)
    assert planner(16) != planner(65536)
    assert planner(65536) == planner(66000)


def test_what_was_measured_beats_the_model() -> None:
    """Each way the fewest chunks within 5% of the best median; only for loads like the one that was tried."""
    planner = DegreePlanner(PROFILE)
    totals = {FORWARD: {1: 1.0, 2: 0.7, 4: 0.68, 8: 0.9}, BACKWARD: {1: 1.0, 2: 1.1, 4: 0.97, 8: 2.0}}
    tried = [
        Observation(way, degree, 4096, {}, total_s * late)
        for way, by_degree in totals.items()
        for degree, total_s in by_degree.items()
        for late in (1.0, 1.01, 30.0)
    ]
    assert planner.settle(4096, tried) == planner(4096) == Degrees(2, 1)
    assert planner(64) == DegreePlanner(PROFILE)(64)
    assert Degrees(8, 8) in planner.trials(4096)


def test_chunks_are_kept_where_pairs_of_steps_gain() -> None:
    """Forward gains a fifth in every pair. Backward, the best of the trials, gains 4% in the median: luck."""
    planner = DegreePlanner(PROFILE)
    planner.settle(
        4096,
        [Observation(way, d, 4096, {}, 1.0 / d) for way in (FORWARD, BACKWARD) for d in (1, 2)],
    )
    assert planner.to_confirm(4096, 8) == [Degrees(), Degrees(2, 2)] * 8
    both = []
    for backward_s in (0.85, 0.86, 1.02, 1.05, 0.8, 0.97, 0.95, 1.1):
        both += [Observation(way, 1, 4096, {}, 1.0) for way in (FORWARD, BACKWARD)]
        both += [
            Observation(FORWARD, 2, 4096, {}, 0.8),
            Observation(BACKWARD, 2, 4096, {}, backward_s),
        ]
    assert planner.confirm(4096, both) == planner(4096) == Degrees(2, 1)
    assert planner.confirm(4096, both) == Degrees(2, 1)
    planner.settle(4096, [Observation(way, 1, 4096, {}, 1.0) for way in (FORWARD, BACKWARD)])
    assert planner.to_confirm(4096, 8) == []


def test_refit_touches_what_drifted() -> None:
    after = refitted(PROFILE, {"intra": 2.0})
    assert after == replace(PROFILE, intra=AlphaBeta(2e-4, 1e-9))
