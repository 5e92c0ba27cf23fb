"""One run: ceilings, then every contender in every case, rows as they come.

L layers, E experts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.contenders.accelerated import Accelerated
from bench.contenders.base import Contender, Demand, DoesNotFitError, Setting, free_memory
from bench.contenders.host_experts import HostExperts
from bench.contenders.hybrid_peers import PeerKernel, measured
from bench.contenders.lru import Lru
from bench.contenders.monde_model import MondeModel, plan_of, settings_of
from bench.contenders.popular import Costs, Popular
from bench.contenders.resident import WAYS, Resident, ResidentModel
from bench.decode import ceilings, models, skew
from bench.decode.bound import Ceilings, Row, Traffic, bound_s, expected_traffic
from bench.decode.options import Options
from bench.decode.shapes import config_of, shape_of
from bench.decode.steps import Case
from monde.executors.host import host_threads

_REALISED_TOKENS = 4096
_FEW_STEPS = 3  # of a contender whose step takes seconds


class Run:
    """setting, popularity by skew, ceilings and floors of one invocation; `rows` yields the results."""

    def __init__(self, options: Options) -> None:
        self.options, self._start_s = options, time.perf_counter()
        self.shape = shape_of(options.model, options.num_layers, options.toy)
        config = config_of(options.model, options.num_layers, options.toy)
        self._say("ceilings")
        on_gpu = options.device.type == "cuda"
        self._memory = ceilings.HostMemory.of_a_layer(options.device) if on_gpu else None
        self.ceilings: Ceilings = ceilings.measure(self.shape, self._memory)
        self._say("dense weights, floors")
        dense = models.make_dense(config, options.device)
        self.setting = Setting(config, self.shape, dense, options.device)
        self.floor = ceilings.Floor(config, dense, options.device, options.num_steps)
        self.p_LE: dict[str, NDArray[np.float64]] = {}
        for name in options.skews:
            skew.apply(name, self.shape, dense)
            self.p_LE[name] = skew.realised(self.floor.model, self.shape, _REALISED_TOKENS)

    # ---- what is measured ----
    def rows(self) -> Iterator[Row]:
        wanted = self.options.contenders
        for case in self.options.cases:
            yield self._floor_row(case)
        if "transformers" in wanted:
            yield from self._transformers()
        if "accelerate" in wanted:
            # The experts' copies are the same whatever the routing asks for.
            yield from self._contender(
                lambda: Accelerated(self.setting, self.options.accelerate_layers),
                self.options.skews[:1],
                _FEW_STEPS,
            )
        if "lru" in wanted or "popular" in wanted:
            yield from self._torch_offloaders()
            free_memory()
        if "peers" in wanted and self.options.peers:
            yield from self._peers()
        if "monde" in wanted:
            yield from self._monde()

    def _monde(self) -> Iterator[Row]:
        options = self.options
        for budget in options.budgets:
            # Residents that follow need one model for all skews; the others start from a heat file of each.
            follows = options.residency == "dynamic" or budget == "all"
            for names in [options.skews] if follows else [(name,) for name in options.skews]:
                for cases, why_not in self._fitting(budget):
                    if why_not:
                        yield from (
                            self._skipped("monde", "monde", budget, n, c, why_not)
                            for c in cases
                            for n in names
                        )
                        continue
                    yield from self._contender(
                        lambda b=budget, c=cases, n=names: MondeModel(  # type: ignore[misc]
                            self.setting, b, c, options.residency, self.p_LE[n[0]]
                        ),
                        names,
                        options.num_steps,
                        cases,
                        budget,
                    )

    def _fitting(self, budget: str) -> Iterator[tuple[list[Case], str]]:
        """Cases that one plan serves, and those that the budget does not hold, with the reason.

        A single sequence gets a plan of its own, as its users would ask for; larger batches share one per context.
        """
        groups: dict[tuple[int, bool], list[Case]] = {}
        for case in sorted(self.options.cases, key=lambda c: (c.context, c.batch)):
            groups.setdefault((case.context, case.batch == 1), []).append(case)
        for cases in groups.values():
            while cases:
                try:
                    self._num_slots(budget, cases)
                    break
                except DoesNotFitError as error:
                    yield [cases.pop()], str(error)
            if cases:
                yield cases, ""

    def _num_slots(self, budget: str, cases: list[Case]) -> int:
        """Residents of a layer, on average, as monde plans them."""
        settings = settings_of(self.setting, budget, cases, "static")
        return int(np.mean(plan_of(self.setting, settings).num_resident_L))

    def _transformers(self) -> Iterator[Row]:
        try:
            held = ResidentModel(self.setting)
        except DoesNotFitError as error:
            for case in self.options.cases:
                yield self._skipped("transformers", "resident eager", "", "", case, str(error))
            return
        for way in WAYS:
            yield from self._contender(
                lambda w=way: Resident(held, w), self.options.skews, self.options.num_steps
            )  # type: ignore[misc]
        held.close()

    def _torch_offloaders(self) -> Iterator[Row]:
        options = self.options
        self._say(f"{options.host_layers} layers of experts into pinned memory")
        model = models.build(self.setting.config, self.setting.dense, options.device, lambda e, l: e)
        host = HostExperts(model, options.host_layers, options.device)
        costs = Costs(host)
        for budget in options.budgets:
            for cases, why_not in self._fitting(budget):
                if why_not or budget == "all":
                    continue
                num_slots = self._num_slots(budget, cases)
                makers: dict[str, Callable[[], Contender]] = {
                    "lru": lambda b=budget, n=num_slots: Lru(self.setting, host, b, n),  # type: ignore[misc]
                    "popular": lambda b=budget, n=num_slots: Popular(self.setting, host, costs, b, n),  # type: ignore[misc]
                }
                for name, make in makers.items():
                    if name in options.contenders:
                        num_steps = max(_FEW_STEPS, options.num_steps // 4)
                        yield from self._contender(make, options.skews, num_steps, cases, budget)

    def _peers(self) -> Iterator[Row]:
        batches = sorted({case.batch for case in self.options.cases})
        for peer in self.options.peers:
            self._say(peer.name)
            try:
                kernel = measured(peer, batches, host_threads(), seconds_s=2.0)
            except RuntimeError as error:
                why = str(error).splitlines()[-1]
                yield self._skipped(f"{peer.name}, host kernel", "hybrid", "", "", self.options.cases[0], why)
                continue
            read = None if self._memory is None else self._cold_bytes_per_s(self._memory)
            for budget in self.options.budgets:
                for cases, why_not in self._fitting(budget):
                    if why_not or budget == "all":
                        continue
                    num_slots = self._num_slots(budget, cases)
                    for case in cases:
                        for name in self.options.skews:
                            yield self._peer_row(kernel, budget, num_slots, name, case, read)

    # ---- one contender ----
    def _contender(
        self,
        make: Callable[[], Contender],
        names: tuple[str, ...],
        num_steps: int,
        cases: list[Case] | None = None,
        budget: str = "",
    ) -> Iterator[Row]:
        start_s = time.perf_counter()
        if self._is_late():
            self._say(f"the time limit has passed: a contender is left out {budget}")
            return
        try:
            contender = make()
        except DoesNotFitError as error:
            self._say(f"left out: {error}")
            return
        self._say(f"{contender.name} {budget} is there after {time.perf_counter() - start_s:.0f} s")
        try:
            for case in cases or self.options.cases:
                for name in names:
                    skew.apply(name, self.shape, self.setting.dense)
                    yield self._row(contender, Demand(case, name, self.p_LE[name]), num_steps)
            generate = getattr(contender, "generate_samples", None)
            if (
                generate is not None
                and self.options.generate
                and not self._is_late()
                and getattr(contender, "_way", "eager") == "eager"
            ):
                demand = Demand((cases or self.options.cases)[0], names[-1], self.p_LE[names[-1]])
                yield self._generate_row(contender, generate, demand, num_steps)
        finally:
            contender.close()

    def _row(self, contender: Contender, demand: Demand, num_steps: int) -> Row:
        try:
            if self._is_late():
                raise DoesNotFitError(f"the time limit of {self.options.time_limit_s:g} s has passed")
            decoding = contender.decoding(demand)
            samples, around = self._around(contender, lambda: decoding.run(num_steps))
        except (DoesNotFitError, torch.OutOfMemoryError) as error:
            who, why = (contender.name, contender.group, contender.budget), str(error).splitlines()[0]
            return self._skipped(*who, demand.skew, demand.case, why)
        return self._finish(contender, contender.name, demand, samples, num_steps, around_bytes_per_s=around)

    def _memory_of(self, contender: Contender) -> ceilings.HostMemory | None:
        """Where the contender's cold experts lie; None where it has none, and where the CPU stands in for the GPU."""
        if self._memory is None or contender.budget in ("", "all"):
            return None
        blobs = getattr(contender, "host_blobs", [])
        # Less would lie in caches.
        return self._memory.of(blobs) if sum(b.num_bytes for b in blobs) >= 1 << 30 else self._memory

    def _around(
        self, contender: Contender, run: Callable[[], list[float]]
    ) -> tuple[list[float], list[float]]:
        """The samples, and how fast cold experts could be read before and after them, where there are any."""
        memory = self._memory_of(contender)
        if memory is None:
            return run(), []
        before = self._cold_bytes_per_s(memory)
        return run(), [before, self._cold_bytes_per_s(memory)]

    def _cold_bytes_per_s(self, memory: ceilings.HostMemory) -> float:
        return ceilings.with_reads(self.ceilings, memory.reads()).cold_bytes_per_s

    def _generate_row(
        self, contender: Any, generate: Callable[..., list[float]], demand: Demand, num_steps: int
    ) -> Row:
        skew.apply(demand.skew, self.shape, self.setting.dense)
        samples, around = self._around(contender, lambda: generate(demand, num_steps))
        name = f"{contender.name}, model.generate"
        return self._finish(contender, name, demand, samples, num_steps, "generate", around)

    def _finish(
        self,
        contender: Contender,
        name: str,
        demand: Demand,
        samples: list[float],
        num_steps: int,
        group: str | None = None,
        around_bytes_per_s: Sequence[float] = (),
    ) -> Row:
        """Times of fewer layers become those of all: everything but the ends of the model repeats per layer.

        around_bytes_per_s: how fast cold experts could be read before and after the samples.
        """
        factor = self.shape.num_layers / contender.num_layers
        traffic = contender.traffic(demand, num_steps).scaled(factor)
        figures = contender.figures(num_steps) | {"note": contender.note} | vars(traffic)
        cold_bytes_per_s = None
        if around_bytes_per_s:
            cold_bytes_per_s = statistics.mean(around_bytes_per_s)
            figures["cold_bytes_per_s"] = list(around_bytes_per_s)
        return Row(
            contender=name,
            group=group or contender.group,
            budget=contender.budget,
            skew=demand.skew,
            batch=demand.case.batch,
            context=demand.case.context,
            median_s=statistics.median(samples) * factor,
            samples_s=[float(f"{sample * factor:.5g}") for sample in samples],
            bound_s=self._bound_s(traffic, demand.case, cold_bytes_per_s),
            measured_layers=contender.num_layers,
            figures=figures,
        )

    def _floor_row(self, case: Case) -> Row:
        samples = self.floor.samples_s(case)
        median_s = statistics.median(samples)
        told = "one graph" if self.options.device.type == "cuda" else "eager"
        return Row(
            f"no experts, {told}", "floor", "", "", case.batch, case.context, median_s, samples, median_s,
            self.shape.num_layers, {},
        )  # fmt: skip

    def _peer_row(
        self,
        kernel: PeerKernel,
        budget: str,
        num_slots: int,
        name: str,
        case: Case,
        cold_bytes_per_s: float | None,
    ) -> Row:
        """cold_bytes_per_s: right after its kernel was timed."""
        p_LE = self.p_LE[name]
        order_LE = np.argsort(np.argsort(-p_LE, axis=1, kind="stable"), axis=1)
        traffic = expected_traffic(p_LE, order_LE < num_slots, case.batch)
        resident_s = self.shape.expert_bytes / self.ceilings.hbm_read_bytes_per_s
        floor_s, num_layers = self.floor.median_s(case), self.shape.num_layers
        step_s = kernel.step_s(case.batch, traffic, floor_s, num_layers, resident_s)
        note = (
            "computed: floor + the peer's kernel for the cold share + its handshake, none of which overlaps, "
            "+ experts of layers without cold ones at the GPU's bandwidth"
        )
        figures = {"layer_s": kernel.layer_s[case.batch], "handshake_s": kernel.handshake_s, "note": note}
        return Row(
            f"{kernel.name}, host kernel", "hybrid", budget, name, case.batch, case.context, step_s, [],
            self._bound_s(traffic, case, cold_bytes_per_s), 1, figures | vars(traffic),
        )  # fmt: skip

    def _skipped(self, who: str, group: str, budget: str, name: str, case: Case, why: str) -> Row:
        return Row(who, group, budget, name, case.batch, case.context, 0.0, [], 0.0, 0, {}, why)

    def _bound_s(self, traffic: Traffic, case: Case, cold_bytes_per_s: float | None = None) -> float:
        floor_s, top = self.floor.median_s(case), self.ceilings
        return bound_s(
            traffic, self.shape.expert_bytes, top, floor_s, cold_bytes_per_s or top.cold_bytes_per_s
        )

    def _is_late(self) -> bool:
        return time.perf_counter() - self._start_s > self.options.time_limit_s

    @staticmethod
    def _say(what: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)
