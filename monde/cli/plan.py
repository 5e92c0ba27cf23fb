"""`monde plan`: will it fit, what goes where, how fast will it be, and what limits it. Loads no weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monde.cli.options import GpuMemoryOption, HostMemoryOption, ModelArgument

if TYPE_CHECKING:
    from monde.models.outline import Outlined
    from monde.planning.budget import MemoryPlan
    from monde.planning.forecast import Speed
    from monde.planning.profile import HardwareProfile

_GPU_SHARE = 0.9  # of the card: the rest is the CUDA context's and the allocator's


@dataclass(frozen=True)
class Forecast:
    plan: MemoryPlan
    decode: Speed
    prefill: Speed


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
    context: Annotated[int, typer.Option(min=1, help="The longest sequence, in tokens.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    prompt: Annotated[int, typer.Option("--prompt", "-p", min=1, help="Tokens of the prompt to time.")] = 512,
    heat: Annotated[
        Path | None, typer.Option(help="A heat file: how popular experts are.", show_default="all equally")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Store a picture of tokens/s over gpu_memory: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Plan a model on a machine, here or elsewhere: what goes where, how fast, and what limits it.

    [bold]Examples[/bold]

      monde plan Qwen/Qwen3-30B-A3B --machine laptop-4060 --gpu-memory 7GiB

      monde plan assets/moe-3m -m h200 --batch 4 --json

      monde plan MODEL --gpu-memory 16GiB --plot budget.png
    """
    from monde.cli.plan_plot import draw_budgets, sweep
    from monde.cli.plot import check_plot
    from monde.models.outline import outline_of
    from monde.planning.budget import plan_memory
    from monde.planning.forecast import with_one_more_channel
    from monde.routing.heat import Heat
    from monde.sizes import parse_size_bytes

    if plot is not None:
        check_plot(plot)
    profile = find_profile(machine)
    on_gpu = profile.gpu is not None
    outlined = outline_of(model, context, batch, None if heat is None else Heat.load(heat), on_gpu)
    card_bytes = 0 if profile.gpu is None else profile.gpu.memory_bytes
    gpu_bytes = parse_size_bytes(gpu_memory, "gpu_memory") if gpu_memory else int(card_bytes * _GPU_SHARE)
    host_bytes = parse_size_bytes(host_memory, "host_memory") if host_memory else profile.memory_bytes
    _check_machine("gpu_memory", gpu_bytes, card_bytes, profile)
    _check_machine("host_memory", host_bytes, profile.memory_bytes, profile)
    if plot is not None and profile.gpu is None:
        raise ValueError(f"--plot: {profile.machine.name} has no GPU, so there is no budget to vary")

    def forecast(gpu_bytes: int, profile: HardwareProfile = profile) -> Forecast:
        memory = plan_memory(outlined.size, on_gpu, gpu_bytes, host_bytes)
        return _forecast(outlined, memory, profile, batch, context, prompt)

    now = forecast(gpu_bytes)
    faster = with_one_more_channel(profile)
    answer = _answer(
        "this machine, calibrated" if machine is None else machine,
        profile,
        outlined,
        now,
        one_more_gib=forecast(gpu_bytes + 2**30) if profile.gpu is not None else None,
        one_more_channel=None if faster is None else forecast(gpu_bytes, faster),
    )
    typer.echo(json.dumps(answer, indent=1) if as_json else _text(now, answer, heat))
    if plot is not None:
        title = f"{Path(model).name} on {profile.machine.name}"
        draw_budgets(sweep(forecast, now, card_bytes), now, title, plot)
        typer.echo(f"monde: plot saved to {plot}", err=True)


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


def _forecast(
    outlined: Outlined, memory: MemoryPlan, profile: HardwareProfile, batch: int, context: int, prompt: int
) -> Forecast:
    from monde.planning.forecast import forecast_decode, forecast_prefill, place_for_decode

    placements = place_for_decode(outlined.outline, outlined.size.layers, memory.slots_bytes, profile, batch)
    decode = forecast_decode(outlined.outline, placements, profile, batch, context)
    return Forecast(memory, decode, forecast_prefill(outlined.outline, placements, profile, prompt))


def _answer(
    profile_is: str,
    profile: HardwareProfile,
    outlined: Outlined,
    now: Forecast,
    one_more_gib: Forecast | None,
    one_more_channel: Forecast | None,
) -> dict[str, Any]:
    def speed(name: str) -> dict[str, Any]:
        s: Speed = getattr(now, name)

        def gain(better: Forecast | None) -> float | None:
            return None if better is None else s.step_s / getattr(better, name).step_s

        return {
            "tokens_per_s": s.tokens_per_s,
            "step_s": s.step_s,
            "limit": s.limit,
            "gain_of_10_percent_more": s.gain,
            "gain_of_one_more_gib_of_gpu_memory": gain(one_more_gib),
            "gain_of_one_more_memory_channel": gain(one_more_channel),
        }

    channels, stored = profile.memory_channels, outlined.stored
    return {
        "profile": profile_is,
        "machine": profile.machine.name,
        "source": profile.source,
        "noisy": [str(noise) for noise in profile.noisy],
        "memory_channels": None if channels is None else asdict(channels),
        "checkpoint": None if stored is None else asdict(stored),
        "num_resident": sum(now.plan.num_resident_L),
        "num_experts": sum(layer.num_experts for layer in now.plan.size.layers),
        "dense_bytes": now.plan.size.dense_bytes,
        "expert_bytes": now.plan.size.expert_bytes,
        "gpu_used_bytes": now.plan.gpu_used_bytes,
        "gpu_bytes": now.plan.gpu_bytes,
        "host_used_bytes": now.plan.host_used_bytes,
        "host_bytes": now.plan.host_bytes,
        "decode": speed("decode"),
        "prefill": speed("prefill"),
    }


def _text(now: Forecast, answer: dict[str, Any], heat: Path | None) -> str:
    lines = [f"profile of {answer['profile']}: {answer['machine']} ({answer['source']})"]
    if answer["noisy"]:
        lines.append(
            f"measured while the machine was noisy: {len(answer['noisy'])} figures in doubt; "
            "run `monde calibrate --force` when it is idle"
        )
    lines += [_checkpoint_text(answer["checkpoint"]), now.plan.explain()]
    for name in ("decode", "prefill"):
        s = answer[name]
        gains = [f"{r} {_percent(g)}" for r, g in s["gain_of_10_percent_more"].items()]
        lines.append(
            f"{name + ':':<8} {s['tokens_per_s']:.3g} tokens/s at best, limited by the {s['limit']}\n"
            f"         faster with a tenth more of: {', '.join(gains)}"
        )
        more = {
            "one more GiB of GPU memory": s["gain_of_one_more_gib_of_gpu_memory"],
            "one more memory channel": s["gain_of_one_more_memory_channel"],
        }
        known = [f"{what}: {_percent(g)}" for what, g in more.items() if g is not None]
        if known:
            lines.append(f"         {', '.join(known)}")
    lines.append(
        "Speeds are bounds for equally popular experts; routing that is skewed makes slots worth more."
        if heat is None
        else f"Speeds are bounds for experts as popular as in {heat}."
    )
    return "\n".join(lines)


def _checkpoint_text(stored: dict[str, int] | None) -> str:
    from monde.sizes import format_bytes as text

    if stored is None:
        return "no checkpoint here: sizes from the configuration"
    unused = f", {text(stored['unused_bytes'])} not loaded" if stored["unused_bytes"] else ""
    return (
        f"checkpoint: {text(stored['dense_bytes'])} dense, {text(stored['expert_bytes'])} of experts{unused} "
        f"in {stored['num_files']} file{'s' if stored['num_files'] > 1 else ''}"
    )


def _percent(gain: float) -> str:
    return f"{100 * (gain - 1):.1f}%"
