"""Schedules chosen while training: measure after the first step, look again now and then, plan anew when it drifted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from hostcompute import ExpertSpec
from monde.planning.gradient_slices import BackwardLayer, GradientPlan, plan_gradients
from monde.planning.pipeline import EXPERTS, Degrees
from monde.planning.training_profile import BACKWARD, DegreePlanner, Observation
from monde.training.fabric import Fabric
from monde.training.gradients import GradientReducer
from monde.training.profiling import profile_layer

LOOK_EVERY = 50  # steps; a look costs the stamps of one step and one small all-reduce
TRIAL_ROUNDS = 2
CONFIRM_ROUNDS = 8
_HEADROOM = 1.25  # rows beyond those of the first step that are profiled


class AutoSchedule:
    """Degrees and gradient slices of the layers that `reducer` knows. before_step and after_step are collective.

    The first step is profiled, the next dozen try degrees, up to sixteen more try the best of them against none in turn;
    what is left runs until costs drift: every LOOK_EVERY steps one is compared with what was predicted, and if that is far off all begins again.
    planners: by shape of experts, from the first step on. gradient_plan: the newest. report: told in a line whenever
    something was planned.
    """

    def __init__(
        self, fabric: Fabric, reducer: GradientReducer, report: Callable[[str], None] = lambda line: None
    ) -> None:
        self.fabric, self.reducer, self.report = fabric, reducer, report
        self.planners: dict[ExpertSpec, DegreePlanner] = {}
        self.gradient_plan: GradientPlan | None = None
        self._trials: list[Degrees] = []
        self._tried: list[Observation] = []
        self._confirms = False
        self._busiest_rows = 0  # that trials are of

    def before_step(self, step_idx: int) -> None:
        """step_idx counts from where this process began."""
        if self.fabric.num_ranks > 1 and (self._trials or step_idx % LOOK_EVERY == 0):
            self.fabric.observations = []
            for layer in self.reducer.layers if self._trials else []:
                layer.schedule = self._trials[0]

    def after_step(self) -> None:
        if self.fabric.observations is None:
            return
        seen, self.fabric.observations = agreed(self.fabric.observations, self.fabric), None
        if not self.planners:
            self._profile()
            self._start_trials()
        elif self._trials:
            self._trials.pop(0)
            self._tried += seen
            if not self._trials and not self._starts_to_confirm():
                self._settle(seen)
        elif self._look(seen):
            self._start_trials()

    def _start_trials(self) -> None:
        """Of the layers' common degrees: layers of several shapes are not told apart in observations."""
        first = self.reducer.layers[0]
        assert first.load is not None
        self._busiest_rows = first.load.busiest_rows
        self._trials = self.planners[first.weights.spec].trials(self._busiest_rows) * TRIAL_ROUNDS
        self._tried, self._confirms = [], False

    def _starts_to_confirm(self) -> bool:
        """After the trials: whether there are chunks to be tried against none, which are the next trials then."""
        if self._confirms or len(self.planners) > 1:
            return False
        planner = next(iter(self.planners.values()))
        planner.settle(self._busiest_rows, self._tried)
        planner.correct(self._tried)
        self._trials = planner.to_confirm(self._busiest_rows, CONFIRM_ROUNDS)
        self._tried, self._confirms = [], True
        return bool(self._trials)

    def _settle(self, newest: list[Observation]) -> None:
        for layer in self.reducer.layers:
            layer.schedule = self.planners[layer.weights.spec]
        if self._confirms and self._tried:
            next(iter(self.planners.values())).confirm(self._busiest_rows, self._tried)
        self._plan_gradients(newest)

    def _profile(self) -> None:
        for layer in self.reducer.layers:
            assert layer.load is not None
            spec = layer.weights.spec
            if spec not in self.planners:
                max_rows = math.ceil(_HEADROOM * layer.load.busiest_rows)
                self.planners[spec] = DegreePlanner(profile_layer(layer, max_rows))
        for spec, planner in self.planners.items():
            profile = planner.profile
            self.report(
                f"experts of F={spec.d_ffn}: interference of experts and links "
                f"{profile.compute_inter.first:.2f}, {profile.compute_inter.second:.2f}"
            )

    def _look(self, observations: list[Observation]) -> bool:
        """Layers of one shape are looked at together."""
        planner = next(iter(self.planners.values()))
        if len(self.planners) > 1:  # observations do not say which shape they are of
            return False
        refitted = planner.observe(observations)
        if refitted:
            self.report(f"costs drifted, fitted again ({planner.num_refits})")
        return refitted

    def _plan_gradients(self, observations: list[Observation]) -> None:
        layers = self.reducer.layers
        planners = [self.planners[layer.weights.spec] for layer in layers]
        profile = planners[0].profile
        if profile.all_reduce is None or not layers:
            return
        backward = [seen for seen in observations if seen.direction == BACKWARD][: len(layers)][::-1]
        if len(backward) < len(layers):
            return  # a layer had no backward, as when it is frozen
        described, degrees = [], []
        for layer, planner, seen, ready in zip(
            layers, planners, backward, self.reducer.ready_elements, strict=True
        ):
            assert layer.load is not None
            rows = layer.load.busiest_rows
            degrees.append(planner(rows))
            described.append(
                BackwardLayer(
                    planner.profile.stages(BACKWARD, rows), degrees[-1].backward, seen.idle_after_s, ready
                )
            )
        self.gradient_plan = plan = plan_gradients(
            described, profile.all_reduce, self.reducer.num_elements, profile.contention
        )
        self.reducer.plan_slices(plan.beside, plan.after)
        beside = 1 - plan.end_elements / max(1, self.reducer.num_elements)
        chunks = ", ".join(sorted({f"{d.forward}/{d.backward}" for d in degrees}))
        self.report(f"chunks forward/backward {chunks}; {beside:.0%} of the gradients beside the backward")


def agreed(observations: list[Observation], fabric: Fabric) -> list[Observation]:
    """The same on all ranks. Experts and gaps: of the slowest rank. Exchanges: of the quickest, because the others'
    include waiting for it. By stage, not by chunk: ranks that share a link or a core take turns, so that each is the
    quickest in some chunks and the slowest in others.
    """
    keys = [(i, name) for i, seen in enumerate(observations) for name in sorted(seen.seconds_s)]
    sign = [1.0 if name.startswith(EXPERTS) else -1.0 for _, name in keys]
    values = [s * observations[i].seconds_s[name] for s, (i, name) in zip(sign, keys, strict=True)]
    values += [seen.total_s for seen in observations] + [seen.idle_after_s for seen in observations]
    tensor = torch.tensor(values, dtype=torch.float64, device=fabric.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=fabric.everyone)
    numbers = tensor.tolist()
    seconds: list[dict[str, float]] = [{} for _ in observations]
    for (i, name), s, value in zip(keys, sign, numbers, strict=False):
        seconds[i][name] = s * value
    total_s, idle_s = numbers[len(keys) :][: len(observations)], numbers[-len(observations) :]
    return [
        replace(seen, seconds_s=by_name, total_s=whole, idle_after_s=gap)
        for seen, by_name, whole, gap in zip(observations, seconds, total_s, idle_s, strict=True)
    ]
