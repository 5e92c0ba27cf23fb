"""`monde plan`: will it fit, what goes where, how fast will it be, and what limits it. Loads no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monde.cli.options import GpuMemoryOption, HostMemoryOption, ModelArgument, check_model

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
        str, typer.Option("--machine", "-m", help="A described machine, or the file of a measured profile.")
    ],
    gpu_memory: GpuMemoryOption = None,
    host_memory: HostMemoryOption = None,
    context: Annotated[int, typer.Option(min=1, help="The longest sequence, in tokens.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    prompt: Annotated[int, typer.Option("--prompt", "-p", min=1, help="Tokens of the prompt to time.")] = 512,
    heat: Annotated[
        Path | None, typer.Option(help="A heat file: how popular experts are.", show_default="all equally")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan a model on a machine, here or elsewhere: what goes where, how fast, and what limits it.

    [bold]Examples[/bold]

      monde plan Qwen/Qwen3-30B-A3B --machine laptop-4060 --gpu-memory 7GiB

      monde plan assets/moe-3m -m h200 --batch 4 --json
    """
    from monde.models.outline import outline_of
    from monde.planning.budget import plan_memory
    from monde.routing.heat import Heat
    from monde.sizes import parse_size_bytes

    profile = _profile(machine)
    check_model(model)
    outlined = outline_of(model, context, batch, None if heat is None else Heat.load(heat))
    on_gpu = profile.gpu is not None
    card_bytes = 0 if profile.gpu is None else profile.gpu.memory_bytes
    gpu_bytes = parse_size_bytes(gpu_memory, "gpu_memory") if gpu_memory else int(card_bytes * _GPU_SHARE)
    host_bytes = parse_size_bytes(host_memory, "host_memory") if host_memory else profile.memory_bytes
    _check_machine("gpu_memory", gpu_bytes, card_bytes, profile)
    _check_machine("host_memory", host_bytes, profile.memory_bytes, profile)

    def forecast(gpu_bytes: int) -> Forecast:
        memory = plan_memory(outlined.size, on_gpu, gpu_bytes, host_bytes, wants_moves=on_gpu)
        return _forecast(outlined, memory, profile, batch, context, prompt)

    now, more = forecast(gpu_bytes), forecast(gpu_bytes + 2**30) if profile.gpu is not None else None
    answer = _answer(profile, now, more)
    typer.echo(json.dumps(answer, indent=1) if as_json else _text(now, answer, heat))


def _profile(machine: str) -> HardwareProfile:
    from monde.planning.machines import DESCRIBED
    from monde.planning.profile import HardwareProfile

    if machine in DESCRIBED:
        return DESCRIBED[machine]
    if not Path(machine).is_file():
        raise ValueError(
            f"--machine: {machine!r} is neither a file nor one of the described machines {', '.join(DESCRIBED)}"
        )
    return HardwareProfile.load(machine)


def _check_machine(what: str, asked_bytes: int, have_bytes: int, profile: HardwareProfile) -> None:
    from monde.sizes import format_bytes

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


def _answer(profile: HardwareProfile, now: Forecast, more: Forecast | None) -> dict[str, Any]:
    def speed(name: str) -> dict[str, Any]:
        s: Speed = getattr(now, name)
        more_s = None if more is None else getattr(more, name).step_s
        return {
            "tokens_per_s": s.tokens_per_s,
            "step_s": s.step_s,
            "limit": s.limit,
            "gain_of_10_percent_more": s.gain,
            "gain_of_one_more_gib_of_gpu_memory": None if more_s is None else s.step_s / more_s,
        }

    return {
        "machine": profile.machine.name,
        "source": profile.source,
        "num_resident": sum(now.plan.num_resident_L),
        "num_experts": sum(layer.num_experts for layer in now.plan.size.layers),
        "gpu_used_bytes": now.plan.gpu_used_bytes,
        "gpu_bytes": now.plan.gpu_bytes,
        "host_used_bytes": now.plan.host_used_bytes,
        "host_bytes": now.plan.host_bytes,
        "decode": speed("decode"),
        "prefill": speed("prefill"),
    }


def _text(now: Forecast, answer: dict[str, Any], heat: Path | None) -> str:
    lines = [f"{answer['machine']} ({answer['source']})", now.plan.explain()]
    for name in ("decode", "prefill"):
        s = answer[name]
        gains = ", ".join(f"{r} {100 * (g - 1):.1f}%" for r, g in s["gain_of_10_percent_more"].items())
        gib = s["gain_of_one_more_gib_of_gpu_memory"]
        gib_text = "" if gib is None else f"; one more GiB of GPU memory: {100 * (gib - 1):.1f}%"
        lines.append(
            f"{name + ':':<8} {s['tokens_per_s']:.3g} tokens/s at best, limited by the {s['limit']}\n"
            f"         faster with a tenth more of: {gains}{gib_text}"
        )
    lines.append(
        "Speeds are bounds for equally popular experts; routing that is skewed makes slots worth more."
    )
    return "\n".join(lines)
