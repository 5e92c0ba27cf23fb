"""`monde bench`: how fast, next to whom."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monde.cli.options import (
    BackendName,
    BackendOption,
    DeferredOption,
    DeviceOption,
    DTypeName,
    DTypeOption,
    GpuMemoryOption,
    HeatOption,
    HostMemoryOption,
    LoadOptions,
    ModelArgument,
    OutputFormat,
    ParallelName,
    ParallelOption,
    RecordRoutingOption,
    ResidencyName,
    ResidencyOption,
    SaveHeatOption,
    SplitPolicyName,
    SplitPolicyOption,
    ThreadsOption,
    load_tokenizer,
)

if TYPE_CHECKING:
    from monde.cli.observe import Observed
    from monde.cli.records import BenchReport, BenchTest, ModelFacts


def bench(
    context: typer.Context,
    model: ModelArgument,
    n_prompt: Annotated[
        str, typer.Option("--n-prompt", "-p", help="Prompt lengths to time, comma-separated; 0 for none.")
    ] = "512",
    n_gen: Annotated[
        str, typer.Option("--n-gen", "-n", help="Numbers of tokens to generate, comma-separated; 0 for none.")
    ] = "128",
    n_depth: Annotated[
        str, typer.Option("--n-depth", "-d", help="Tokens in the KV cache before the clock starts.")
    ] = "0",
    batch: Annotated[str, typer.Option("--batch", "-b", help="Sequences at once.")] = "1",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Timed rounds, after one untimed.")
    ] = 5,
    output: Annotated[
        OutputFormat, typer.Option("--output", "-o", help="Format on standard output.")
    ] = OutputFormat.MD,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure next to it, taking turns: transformers (as it comes), "
            "transformers:eager, :grouped_mm, :batched_mm, or :best for all three. Repeatable."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result: a .png, .svg or .pdf file.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write a timeline as well: GPU streams, copies and host threads by layer, as a Chrome trace (.json) "
            "for ui.perfetto.dev."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to feed.", show_default="shipped literature")
    ] = None,
    random_tokens: Annotated[
        bool, typer.Option("--random-tokens", help="Feed random tokens; they distort routing.")
    ] = False,
    gpu_memory: GpuMemoryOption = None,
    host_memory: HostMemoryOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = DTypeName.AUTO,
    backend: BackendOption = BackendName.AUTO,
    threads: ThreadsOption = None,
    residency: ResidencyOption = ResidencyName.DYNAMIC,
    heat: HeatOption = None,
    save_heat: SaveHeatOption = None,
    record_routing: RecordRoutingOption = None,
    split_policy: SplitPolicyOption = SplitPolicyName.BEST,
    parallel: ParallelOption = ParallelName.SHARDED,
    deferred_experts: DeferredOption = 0,
) -> None:
    """Time prompts (pp512) and generation (tg128): tokens/s, TTFT, TPOT, bytes moved, memory speed.

    Options that take several values time every combination. Runners take turns within each repetition,
    after an untimed round and a check that they choose the same tokens. An encoder-decoder reads prompts with its
    encoder and generates with its decoder, from a prompt of -d tokens, at least one.

    [bold]Examples[/bold]

      monde bench assets/moe-3m

      monde bench MODEL -p 128,512 -n 64 -d 0,1024 -b 1,4 -r 3 -o json > result.json

      monde bench MODEL --baseline transformers:best --plot speed.png

      monde bench MODEL -p 512 -n 32 -r 1 --trace timeline.json

      monde bench MODEL --text mine.txt --save-heat mine.heat --record-routing mine.npz     # in a round of their own

      torchrun --nproc-per-node 2 -m monde bench MODEL -b 4     # each rank its own 4 sequences
    """
    tests = parse_tests(n_prompt, n_gen, n_depth, batch)
    from monde.cli.baselines import parse_baselines
    from monde.cli.measure import CHECK_PROMPT_TOKENS, CHECK_STEPS
    from monde.cli.observe import Observed

    if text is not None and random_tokens:
        raise ValueError("--text and --random-tokens are two answers to one question; give one of them")
    baselines = parse_baselines(baseline or [])
    if plot is not None:
        from monde.cli.plot import check_plot

        check_plot(plot)
    if trace is not None:
        from monde.cli.timeline import check_trace

        check_trace(trace)
    observed = Observed(save_heat, record_routing)
    observed.check()
    from monde.cli.ranks import refuse_over_ranks, torchrun_command, torchrun_mesh

    with torchrun_mesh(device) as mesh:
        if mesh is not None:
            refuse_over_ranks("--baseline", baselines)
            refuse_over_ranks("--trace", trace)
            refuse_over_ranks("--save-heat", save_heat)
            refuse_over_ranks("--record-routing", record_routing)
        options = LoadOptions(
            model,
            gpu_memory,
            host_memory,
            device,
            dtype,
            backend,
            threads,
            max_context=max(CHECK_PROMPT_TOKENS + CHECK_STEPS, *(test.num_positions for test in tests)),
            max_batch=max(test.batch for test in tests),
            residency=residency,
            heat_file=heat,
            mesh=mesh,
            parallel=parallel,
            split_policy=split_policy,
            deferred_experts=deferred_experts,
        )
        command = torchrun_command(context.obj, mesh)
        report = run(command, options, tests, baselines, repetitions, text, random_tokens, trace, observed)
        if mesh is not None and mesh.get_local_rank() > 0:
            return
    from monde.cli.report import render

    typer.echo(render(report, output))
    if plot is not None:
        from monde.cli.plot import draw

        draw(report, plot)
        typer.echo(f"monde: plot saved to {plot}", err=True)
    if trace is not None:
        typer.echo(f"monde: timeline saved to {trace}; open it at ui.perfetto.dev", err=True)
    for line in observed.told():
        typer.echo(line, err=True)


def run(
    command: str,
    options: LoadOptions,
    tests: list[BenchTest],
    baselines: list[str],
    repetitions: int,
    text: Path | None,
    random_tokens: bool,
    trace: Path | None = None,
    observed: Observed | None = None,
) -> BenchReport:
    """Load, check and measure, and write a timeline where one was asked for; progress on standard error. `command`: what was typed, for the record."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from monde.cli.baselines import load_transformers
    from monde.cli.machine import Machine, read_ceiling
    from monde.cli.measure import measure, num_rounds, observe
    from monde.cli.records import BenchReport
    from monde.cli.runners import load_monde, model_facts
    from monde.cli.texts import token_source

    tokenizer = load_tokenizer(options.model)
    facts = model_facts(options)
    check_lengths(tests, facts)
    source = token_source(tokenizer, facts.vocab_size, text, random_tokens)
    is_quiet = False
    if options.mesh is not None:
        rank, is_quiet = options.mesh.get_local_rank(), options.mesh.get_local_rank() > 0
        source = replace(source, rank=rank, num_ranks=options.mesh.size())
    started = datetime.now(UTC).isoformat(timespec="seconds")
    runners = [load_monde(options)]
    if baselines:
        runners += load_transformers(options, facts, baselines)
    columns = (TextColumn("{task.description:<42}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=is_quiet), transient=True) as bar:
        task = bar.add_task("", total=num_rounds(len(runners), len(tests), repetitions))
        results = measure(
            runners,
            tests,
            source,
            repetitions,
            exact=facts.dtype == "float32" and not options.deferred_experts,
            progress=lambda what: bar.update(task, advance=1, description=what),
        )
    if trace is not None:
        from monde.cli import timeline

        timeline.trace(runners[0], tests, source, trace)
    if observed:
        observe(runners[0], tests, source, observed, options.model)
    return BenchReport(
        command=command,
        started=started,
        machine=Machine.here(),
        model=facts,
        text=source.origin,
        read_ceiling_bytes_per_s=read_ceiling(options.num_threads),
        results=tuple(results),
    )


def parse_tests(n_prompt: str, n_gen: str, n_depth: str, batch: str) -> list[BenchTest]:
    """Every combination of the comma-separated values. Errors: ValueError for anything but whole numbers."""
    from monde.cli.records import BenchTest

    depths, batches = _counts(n_depth, "-d", 0), _counts(batch, "-b", 1)
    shapes = [(p, 0) for p in _counts(n_prompt, "-p", 0)] + [(0, n) for n in _counts(n_gen, "-n", 0)]
    tests = [BenchTest(p, n, d, b) for (p, n), d, b in product(shapes, depths, batches) if p or n]
    if not tests:
        raise ValueError("-p 0 -n 0 leaves nothing to time; give -p or -n a number above 0")
    return tests


def _counts(text: str, option: str, least: int) -> list[int]:
    values = []
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < least:
            raise ValueError(
                f"{option} {text}: expected whole numbers from {least} up, with commas between, as in 128,512"
            )
        values.append(int(part))
    return list(dict.fromkeys(values))


def check_lengths(tests: list[BenchTest], facts: ModelFacts) -> None:
    """Errors: ValueError when a test is longer than the model's positions, or continues what an encoder has read."""
    if facts.is_encoder_decoder and any(test.num_prompt and test.depth for test in tests):
        raise ValueError(
            f"-d: {facts.name} reads a prompt with its encoder, at once; give -p 0 with -d, which is what it has read"
        )
    longest = max(tests, key=lambda test: test.num_positions)
    if facts.num_positions is not None and longest.num_positions > facts.num_positions:
        raise ValueError(
            f"{longest.name} needs {longest.num_positions} positions, {facts.name} has "
            f"{facts.num_positions}; lower -p, -n or -d"
        )
