"""The bench of the cost model: its arithmetic, and that its prompts run, with the CPU in the GPU's place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("hostcompute._native")

from bench.cost_model import Report, errors_of
from bench.cost_model_gpu import (
    PROMPTS,
    balanced_step_s,
    batch_of,
    prompt_s,
    run_kinds,
    shared_step_s,
    sides_of,
)
from hostcompute import ExpertBank, ExpertSpec, make_pool
from monde.calibration.host import fill
from monde.planning.cost import CostModel, ExpertShape
from monde.planning.machines import DESCRIBED
from monde.planning.split import Load, best_split

SPEC = ExpertSpec(20, 64, 128)
COST = CostModel(DESCRIBED["h200"], ExpertShape(2048, 768))
CPU = torch.device("cpu")


def test_every_kind_of_prompt_runs_and_computes_its_pairs() -> None:
    cost = CostModel(DESCRIBED["h200"], ExpertShape(SPEC.d_model, SPEC.d_ffn))
    report = Report()
    with fill(ExpertBank(SPEC, "native", make_pool(1))) as bank:
        for kind, run in run_kinds(bank, cost, None, CPU, 3):
            report.add(kind, SPEC, run)
    assert report.failures == []
    kinds = report.by_kind()
    assert set(kinds) >= {"GPU-resident", "GPU-fetched", "host beside GPU"}
    assert all(len(mixes) == 3 for kind, mixes in kinds.items() if kind != "cut along F")
    assert all(mix.predicted_s > 0 and mix.measured_s > 0 for mix in report.mixes)


def test_a_batch_has_the_tokens_asked_for_of_experts_in_turn() -> None:
    tokens_A = np.array([3, 1, 5])
    batch = batch_of(tokens_A, 19, 20, 8, CPU)
    ids = batch.topk_ids_TK.numpy()
    assert ids.shape == (5, 3)
    assert [int((ids == e).sum()) for e in (19, 0, 1)] == [3, 1, 5]
    assert (ids >= -1).all()


def test_a_kind_that_fails_is_kept_and_told() -> None:
    report = Report()

    def broken():  # type: ignore[no-untyped-def]
        raise RuntimeError("no such kernel")

    report.add("zero-copy", SPEC, broken)
    report.add("host", SPEC, lambda: [("host", [1], 1.1, [1.0, 1.0, 9.0]), ("host", [2], 0.5, [1.0])])
    assert report.failures == ["zero-copy, 64x128: RuntimeError: no such kernel"]
    assert errors_of(report.by_kind()["host"]) == pytest.approx((0.3, 0.48))


def test_a_prompt_takes_what_its_split_says_and_its_pipeline_adds() -> None:
    """The split lets lanes run freely; the schedule's last product waits for its copy. Before the first copy nothing
    slows the host there, while the split takes that lead for copying."""
    tokens_A = np.repeat([64, 30], [24, 20])
    cut = next(prompt for prompt in PROMPTS if prompt.kind == "cut along F")
    seconds, is_cut = prompt_s(COST, tokens_A, cut)
    split = best_split(Load(tokens_A, np.zeros(44, bool), 64, 32), COST)
    assert is_cut == (split.cut_expert is not None)
    own_s = COST.gpu.prompt.plan_s
    assert own_s + split.makespan_s * 0.97 <= seconds <= own_s + split.makespan_s * 1.3
    by_kind = {prompt.kind: prompt_s(COST, tokens_A, prompt)[0] for prompt in PROMPTS}
    assert by_kind["GPU-resident"] == pytest.approx(
        own_s + COST.gpu.prompt.layer_s + COST.resident_s(tokens_A).sum()
    )
    assert by_kind["GPU-resident"] < by_kind["cut along F"] < by_kind["GPU-fetched"]
    assert by_kind["cut along F"] < by_kind["host beside GPU"]


def test_no_share_is_better_than_the_balanced_one() -> None:
    tokens_A = np.array([1, 4, 2, 1, 1, 1, 1, 1])
    shares = [shared_step_s(COST, tokens_A, float(x)) for x in np.linspace(0.02, 0.98, 97)]
    assert balanced_step_s(COST, tokens_A, 0.0) == pytest.approx(min(shares), rel=0.08)
    sides = sides_of(COST, tokens_A)
    assert shared_step_s(COST, tokens_A, 1.0) >= sides.gpu_lead_s + sides.bus_s
