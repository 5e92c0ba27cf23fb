"""Timing: who runs, on what tokens, in which order. Decides nothing about how results look.

Runners take turns repetition by repetition, so that a machine that slows down slows all of them.
An untimed round comes first, and before everything a check that all runners choose the same next tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from monde.cli.decoder import choices_without_cache, decoder_of
from monde.cli.observe import Observed
from monde.cli.records import BenchTest, Sample, TestResult
from monde.cli.runners import Runner
from monde.cli.texts import TokenSource
from monde.models.decode_graph import step_cache
from monde.models.memory import PeakMemory

CHECK_PROMPT_TOKENS, CHECK_STEPS = 64, 32

Progress = Callable[[str], None]


def num_rounds(num_runners: int, num_tests: int, repetitions: int) -> int:
    """How often `measure` will report progress: a check each, then warm-up and repetitions of every test."""
    return num_runners * (1 + num_tests * (1 + repetitions))


@torch.inference_mode()
def measure(
    runners: list[Runner],
    tests: list[BenchTest],
    source: TokenSource,
    repetitions: int,
    exact: bool,
    progress: Progress,
) -> list[TestResult]:
    """All tests by all runners, interleaved.

    exact: any difference in the chosen tokens is an error, as it must be in fp32.
    Errors: RuntimeError when `exact` and runners differ.
    """
    agreement = check_agreement(runners, source, exact, progress)
    results = []
    for test in tests:
        results += _measure_test(runners, test, source, repetitions, agreement, progress)
    return results


def _measure_test(
    runners: list[Runner],
    test: BenchTest,
    source: TokenSource,
    repetitions: int,
    agreement: dict[str, float | None],
    progress: Progress,
) -> list[TestResult]:
    skipped = {runner.facts.label: runner.why_not(test) for runner in runners}
    samples: dict[str, list[Sample]] = {runner.facts.label: [] for runner in runners}
    peaks: dict[str, tuple[int, int]] = {}
    for round_idx in range(repetitions + 1):
        tokens = source.window(round_idx, test.batch, test.num_positions + 1)
        for runner in runners:
            label = runner.facts.label
            progress(f"{test.name} b{test.batch}  {label}  round {round_idx}/{repetitions}")
            if skipped[label]:
                continue
            if round_idx:
                samples[label].append(_sample(runner, test, tokens))
            else:
                peaks[label] = _warm_up(runner, test, tokens)
    return [
        TestResult(
            runner=runner.facts,
            test=test,
            samples=tuple(samples[runner.facts.label]),
            peak_host_bytes=peaks.get(runner.facts.label, (0, 0))[0],
            peak_gpu_bytes=peaks.get(runner.facts.label, (0, 0))[1],
            agreement=agreement[runner.facts.label],
            skipped=skipped[runner.facts.label],
        )
        for runner in runners
    ]


def _warm_up(runner: Runner, test: BenchTest, tokens: Tensor) -> tuple[int, int]:
    """Run untimed; return peak bytes in host memory (weights included) and on the GPU."""
    on_gpu = runner.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with PeakMemory() as memory:
        _sample(runner, test, tokens)
    loading = runner.facts.loading
    host_bytes = max(loading.peak_host_bytes, loading.left_host_bytes + memory.stop())
    return host_bytes, torch.cuda.max_memory_allocated() if on_gpu else 0


def _sample(runner: Runner, test: BenchTest, tokens: Tensor) -> Sample:
    """One repetition: fill the cache to the depth, then time the prompt or the steps.

    Generation is fed with the text itself, so that all runners route the same tokens; each step still chooses
    a token and brings it to the host, as a sampler must.
    """
    runner.activate()
    tokens = tokens.to(runner.model.device)
    with step_cache(runner.model, test.batch, test.num_positions) as cache:
        decoder = decoder_of(runner.model, cache)
        depth = max(test.depth, decoder.least_depth) if test.num_generated else test.depth
        if depth:
            decoder.read(tokens[:, :depth])
        runner.reset_counters()
        start_s = time.perf_counter()
        if test.num_prompt:
            decoder.read(tokens[:, depth : depth + test.num_prompt])
        for position in range(depth, depth + test.num_generated):
            decoder.step(tokens[:, position : position + 1])
        duration_s = runner.slowest_s(time.perf_counter() - start_s)
    return Sample(duration_s, runner.counters() if runner.counters else None)


@torch.inference_mode()
def observe(
    runner: Runner, tests: list[BenchTest], source: TokenSource, observed: Observed, model: str
) -> None:
    """Every test once more, untimed, with what the routers of `model` ask for written down."""
    engine: Any = runner.model.monde
    with observed.of(engine, model):
        for test in tests:
            _sample(runner, test, source.window(0, test.batch, test.num_positions + 1))


def check_agreement(
    runners: list[Runner], source: TokenSource, exact: bool, progress: Progress
) -> dict[str, float | None]:
    """Share of next tokens on which a runner agrees with the first baseline, over a prompt and cached steps.

    None for a runner that cannot take the check's prompt, and without baselines.
    Errors: RuntimeError when `exact` and any token differs.
    """
    agreement: dict[str, float | None] = {runner.facts.label: None for runner in runners}
    chosen: dict[str, list[int]] = {}
    for runner in runners:
        progress(f"check  {runner.facts.label}")
        if not runner.why_not(BenchTest(CHECK_PROMPT_TOKENS, 0, 0, 1)):
            chosen[runner.facts.label] = _choices(runner, source)
    reference = next((tokens for label, tokens in chosen.items() if label != "monde"), None)
    if reference is None:
        return agreement
    for label, tokens in chosen.items():
        same = sum(a == b for a, b in zip(tokens, reference, strict=True))
        if exact and same < len(tokens):
            raise RuntimeError(
                f"{label} chose {len(tokens) - same} of {len(tokens)} tokens unlike the baseline, in fp32: "
                "this is a bug; please report it with the model's config.json"
            )
        agreement[label] = same / len(tokens)
    return agreement


def _choices(runner: Runner, source: TokenSource) -> list[int]:
    """The likeliest next token at every position of a prompt, then at cached steps."""
    runner.activate()
    tokens_1T = source.window(0, 1, CHECK_PROMPT_TOKENS + CHECK_STEPS).to(runner.model.device)
    prompt = tokens_1T[:, :CHECK_PROMPT_TOKENS]
    chosen = choices_without_cache(runner.model, prompt)
    with step_cache(runner.model, 1, CHECK_PROMPT_TOKENS + CHECK_STEPS) as cache:
        decoder = decoder_of(runner.model, cache)
        decoder.read(prompt)
        for position in range(CHECK_PROMPT_TOKENS, CHECK_PROMPT_TOKENS + CHECK_STEPS):
            chosen += decoder.step(tokens_1T[:, position : position + 1])
    return chosen
