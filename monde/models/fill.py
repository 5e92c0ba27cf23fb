"""Experts into the engine, one at a time, with a progress bar; the same for checkpoints and live modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor
from transformers.utils import logging

from monde.core import LoadReport
from monde.engine import Engine
from monde.models.experts import ExpertsModule


class ExpertArrays(Protocol):
    """Anything that gives single experts under the keywords of ExpertBank.load."""

    def arrays(self, expert_id: int) -> Mapping[str, Tensor]: ...


class ProgressBar:
    """transformers' own bar, so that `disable_progress_bar` and the verbosity settings hold."""

    def __init__(self, engine: Engine) -> None:
        ranked = engine.ranked
        specs = [layer.spec for layer in engine.layers] if ranked is None else ranked.whole
        quiet = ranked is not None and ranked.ranks.rank > 0  # one bar on a terminal that ranks share
        num_experts = 0 if quiet else sum(spec.num_experts for spec in specs)
        self._bar = logging.tqdm(
            total=num_experts, desc="Loading experts", unit="expert", disable=quiet or None
        )

    def step(self) -> None:
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()


def fill_layer(
    engine: Engine, layer_idx: int, module: ExpertsModule, source: ExpertArrays, bar: ProgressBar
) -> None:
    """Load every expert of one layer. Errors: ValueError naming layer and expert, e.g. for NaN in weights."""
    for expert_id in range(module.spec.num_experts):
        if not engine.holds(layer_idx, expert_id):
            bar.step()
            continue
        arrays = {role: array.cpu() for role, array in source.arrays(expert_id).items()}
        try:
            engine.load_expert(layer_idx, expert_id, arrays)
        except ValueError as error:
            raise ValueError(f"{module.name}, expert {expert_id}: {error}") from error
        bar.step()


def load_report(engine: Engine, seconds_s: float, peak_host_bytes: int) -> LoadReport:
    plan = engine.plan
    return LoadReport(
        seconds_s=seconds_s,
        peak_host_bytes=peak_host_bytes,
        dense_bytes=plan.size.dense_bytes,
        expert_bytes=plan.size.expert_bytes,
        num_moe_layers=len(engine.fronts),
        num_experts=sum(layer.num_experts for layer in plan.size.layers),
        num_resident_experts=sum(plan.num_resident_L),
        num_released_experts=plan.num_released,
        saved_host_bytes=plan.saved_bytes,
    )
