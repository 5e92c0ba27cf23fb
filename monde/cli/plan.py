"""`monde plan`: will it fit, what goes where, how fast will it be, and what limits it. Loads no weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monde.cli.options import DTypeName, GpuMemoryOption, HostMemoryOption, ModelArgument

if TYPE_CHECKING:
    from monde.planning.profile import HardwareProfile

_CONTEXT, _PROMPT = 4096, 512
_MOST_TOKENS, _MOST_SEQUENCES = 2**27, 2**16  # beyond any model; products stay within 64 bits
_GPU_SHARE = 0.9  # of the card: the rest is the CUDA context's and the allocator's


def plan(
    model: ModelArgument,
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine",
            "-m",
            help="A described machine, or the file of a measured profile.",
            show_default="this one, as measured by `monde calibrate`",
        ),
    ] = None,
    gpu_memory: GpuMemoryOption = None,
    host_memory: HostMemoryOption = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MOST_TOKENS,
            help="The longest sequence, in tokens.",
            show_default="4096, or the model's positions",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=_MOST_SEQUENCES, help="Sequences at once.")] = 1,
    prompt: Annotated[
        int | None,
        typer.Option(
            "--prompt",
            "-p",
            min=1,
            max=_MOST_TOKENS,
            help="Tokens of the prompt to time.",
            show_default="512, or the context",
        ),
    ] = None,
    weight_format: Annotated[
        DTypeName, typer.Option("--format", help="Weights; auto is the checkpoint's own.")
    ] = DTypeName.AUTO,
    heat: Annotated[
        Path | None, typer.Option(help="A heat file: how popular experts are.", show_default="all equally")
    ] = None,
    routing: Annotated[
        Path | None,
        typer.Option(
            help="Routing to play on the machine, step by step; --record-routing of generate or bench writes it."
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Nodes x ranks of a node, as 2x8: plan the exchanges between them instead of memory."
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="With --mesh: a described cluster, or the file of a measured network.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Store a picture of tokens/s over gpu_memory: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Plan a model on a machine, here or elsewhere: what goes where, how fast, and what limits it.

    Exits with 2 where it does not fit, and says the smallest gpu_memory that would do and the formats that fit.

    [bold]Examples[/bold]

      monde plan Qwen/Qwen3-30B-A3B --machine laptop-4060 --gpu-memory 7GiB

      monde plan assets/moe-3m -m h200 --batch 4 --json

      monde plan MODEL --gpu-memory 16GiB --plot budget.png

      monde plan MODEL --mesh 2x8 --network a800-1nic --prompt 8192
    """
    if mesh is not None or network is not None:
        given: dict[str, object] = {
            "--machine": machine,
            "--gpu-memory": gpu_memory,
            "--host-memory": host_memory,
            "--context": context,
        }
        given |= {
            "--heat": heat,
            "--routing": routing,
            "--plot": plot,
            "--format": weight_format is not DTypeName.AUTO,
        }
        if mesh is None or any(given.values()):
            wrong = [option for option, value in given.items() if value] or ["--network without --mesh"]
            raise ValueError(
                f"{', '.join(wrong)}: has no meaning for exchanges; with --mesh give --network and --prompt"
            )
        typer.echo(_plan_mesh(model, mesh, network, batch * (prompt or _PROMPT), as_json))
        return
    from monde.cli.plan_forecast import Question
    from monde.cli.plan_plot import draw_budgets, sweep
    from monde.cli.plan_text import THIS_MACHINE, answer_of, impossible, text_of, trace_answer
    from monde.cli.plot import check_plot
    from monde.planning.forecast import with_one_more_channel
    from monde.planning.formats import format_named
    from monde.sizes import parse_size_bytes

    if plot is not None:
        check_plot(plot)
    profile = find_profile(machine)
    card_bytes = 0 if profile.gpu is None else profile.gpu.memory_bytes
    gpu_bytes = parse_size_bytes(gpu_memory, "gpu_memory") if gpu_memory else int(card_bytes * _GPU_SHARE)
    host_bytes = parse_size_bytes(host_memory, "host_memory") if host_memory else profile.memory_bytes
    _check_machine("gpu_memory", gpu_bytes, card_bytes, profile)
    _check_machine("host_memory", host_bytes, profile.memory_bytes, profile)
    if plot is not None and profile.gpu is None:
        raise ValueError(f"--plot: {profile.machine.name} has no GPU, so there is no budget to vary")
    context = find_context(model, context)
    prompt = find_prompt(prompt, context)
    question = Question(model, profile, host_bytes, context, batch, prompt, heat)
    stored = question.stored_format
    asked = stored if weight_format is DTypeName.AUTO else format_named(weight_format.value)
    verdicts = question.verdicts(gpu_bytes)
    outlined = question.outlined(asked)
    mine = next(verdict for verdict in verdicts if verdict.format is asked)
    profile_is = THIS_MACHINE if machine is None else machine
    answer = answer_of(profile_is, question, asked, verdicts, outlined)
    if mine.forecast is None:
        if as_json:
            typer.echo(json.dumps(answer, indent=1))
        raise ValueError(impossible(mine, question, verdicts, card_bytes))
    more_gpu = question.forecast(outlined, gpu_bytes + 2**30) if profile.gpu is not None else None
    channel = with_one_more_channel(profile)
    more_host = None if channel is None else question.forecast(outlined, gpu_bytes, channel)
    answer = answer_of(profile_is, question, asked, verdicts, outlined, more_gpu, more_host)
    if routing is not None:
        answer["routing"] = trace_answer(question.played(outlined, mine.forecast, routing))
    typer.echo(json.dumps(answer, indent=1) if as_json else text_of(mine.forecast, answer, heat))
    if plot is not None:
        title = f"{Path(model).name} in {asked.name} on {profile.machine.name}"
        forecasts = sweep(lambda num_bytes: question.forecast(outlined, num_bytes), mine.forecast, card_bytes)
        draw_budgets(forecasts, mine.forecast, title, plot)
        typer.echo(f"monde: plot saved to {plot}", err=True)


def _plan_mesh(model: str, mesh: str, network: str | None, tokens: int, as_json: bool) -> str:
    from monde.cli import plan_mesh
    from monde.planning.network import choose

    profile = plan_mesh.find_network(network, *plan_mesh.parse_mesh(mesh))
    traffic = plan_mesh.traffic_of(model, tokens)
    choice = choose(profile, traffic)
    if as_json:
        return json.dumps(plan_mesh.mesh_answer(choice, profile, traffic), indent=1)
    return plan_mesh.mesh_text(choice, profile, traffic, str(network))


def find_profile(machine: str | None) -> HardwareProfile:
    """Of a described machine, a file, or this machine. Errors: ValueError with the remedy where there is none."""
    from monde import profile_store as store
    from monde.planning.machines import DESCRIBED
    from monde.planning.profile import HardwareProfile

    if machine is None:
        here = store.load(store.this_machine())
        if here is None:
            raise ValueError(
                "this machine has not been measured; run `monde calibrate`, or give --machine with a file or one of "
                f"the described machines {', '.join(DESCRIBED)}"
            )
        return here
    if machine in DESCRIBED:
        return DESCRIBED[machine]
    if not Path(machine).is_file():
        raise ValueError(
            f"--machine: {machine!r} is neither a file nor one of the described machines {', '.join(DESCRIBED)}"
        )
    return HardwareProfile.load(machine)


def find_context(model: str, context: int | None) -> int:
    """The longest sequence to plan for: as asked, else 4096 or as many positions as the model has.

    More than those are warned of and not refused: memory and speed are what they are, and with rotary embeddings
    transformers goes on.
    """
    from monde.models.configuration import read_configuration
    from monde.models.positions import positions_of

    num_positions = positions_of(read_configuration(model))
    if context is None:
        return _CONTEXT if num_positions is None else min(_CONTEXT, num_positions)
    if num_positions is not None and context > num_positions:
        warnings.warn(
            f"--context {context} is longer than the {num_positions} positions that {model} was made for; lower it, "
            "unless the model is known to go on",
            stacklevel=2,
        )
    return context


def find_prompt(prompt: int | None, context: int) -> int:
    """Errors: ValueError for a prompt longer than the longest sequence."""
    if prompt is None:
        return min(_PROMPT, context)
    if prompt > context:
        raise ValueError(
            f"--prompt {prompt} is longer than the longest sequence, of {context} tokens; lower it, or give "
            f"--context {prompt} or more"
        )
    return prompt


def _check_machine(what: str, asked_bytes: int, have_bytes: int, profile: HardwareProfile) -> None:
    from monde.sizes import format_bytes

    if asked_bytes > 0 == have_bytes:
        raise ValueError(
            f"{what}: {profile.machine.name} has no GPU; leave {what} out, or plan for another machine with --machine"
        )
    if asked_bytes > have_bytes:
        raise ValueError(
            f"{what}: {format_bytes(asked_bytes)} is more than the {format_bytes(have_bytes)} of "
            f"{profile.machine.name}; ask for less"
        )
