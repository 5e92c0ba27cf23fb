"""`monde calibrate`: measure this machine once, so that plans are made of its own numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from monde.planning.profile import HardwareProfile, MachineIdentity, MemoryChannels

EXIT_NOISY = 1


def calibrate(
    force: Annotated[bool, typer.Option("--force", help="Measure again, whatever is stored.")] = False,
    accept_noise: Annotated[
        bool, typer.Option("--accept-noise", help="Store the profile of a noisy machine, marked as such.")
    ] = False,
    memory_channels: Annotated[
        str | None,
        typer.Option(
            metavar="NxGB/S", help="Host memory channels and GB/s of one, as 12x38.4: no measurement tells."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
) -> None:
    """Measure this machine for `monde plan`: memory, experts on host and GPU, the bus, and pairs of them at once.

    Takes less than a minute on an idle machine, once per machine and version of monde. Two halves of the samples
    must agree; if they do not, nothing is stored and the exit code is 1, unless --accept-noise. The profile lies in
    $XDG_CACHE_HOME/monde, by default ~/.cache/monde.

    [bold]Examples[/bold]

      monde calibrate

      monde calibrate --force --memory-channels 12x38.4
    """
    from monde import profile_store as store

    machine = store.this_machine()
    channels = None if memory_channels is None else parse_channels(memory_channels)
    stored = None if force else store.load(machine)
    if stored is None:
        store.check_writable(machine)
    if stored is not None and channels is None:
        profile, path = stored, store.path_of(machine)
        where = f"measured before, stored in {path}; --force measures again"
    else:
        profile = replace(stored or _measure(machine), memory_channels=channels)
        is_trusted = accept_noise or stored is not None or not profile.noisy
        where = f"stored in {store.save(profile)}" if is_trusted else ""
    typer.echo(json.dumps(asdict(profile), indent=1) if as_json else describe(profile))
    if where:
        typer.echo(f"monde: {where}", err=True)
        return
    typer.echo(
        f"monde: error: measurements that changed while they were taken, or fit no line: {len(profile.noisy)}. Nothing is stored; measure "
        "again when the machine is idle, or give --accept-noise",
        err=True,
    )
    raise typer.Exit(EXIT_NOISY)


def _measure(machine: MachineIdentity) -> HardwareProfile:
    """With a bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from monde.calibration.measure import calibrate

    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("experts in memory", total=None)

        def start(num_probes: int) -> Callable[[str], None]:
            bar.update(task, total=num_probes)
            return lambda what: bar.update(task, advance=1, description=what)

        return calibrate(machine, start=start)


def parse_channels(text: str) -> MemoryChannels:
    """Errors: ValueError for anything but a whole number, "x" and GB/s."""
    from monde.planning.profile import MemoryChannels

    num_channels, _, gbytes_per_s = text.partition("x")
    try:
        return MemoryChannels(int(num_channels), float(gbytes_per_s) * 1e9)
    except ValueError as error:
        raise ValueError(
            f"--memory-channels {text}: expected the number of channels and the GB/s of one, as in 12x38.4"
        ) from error


def describe(profile: HardwareProfile) -> str:
    """The headline figures, a line each."""
    host, gpu, machine = profile.host_expert, profile.gpu, profile.machine
    reads = ", ".join(
        f"{n:.0f}: {y / 1e9:.3g}" for n, y in zip(profile.host_read.x, profile.host_read.y, strict=True)
    )
    rows = {
        "machine": f"{machine.name}, {machine.cpu}, {machine.num_cores} cores, monde {machine.library_version}",
        "source": profile.source,
        "host read": f"{reads} GB/s by threads",
        "host experts": f"{host.bytes_per_s / 1e9:.3g} GB/s with few tokens, "
        f"{max(host.flops_per_s.y) / 1e12:.3g} TFLOP/s with many",
        **{
            f"  in {name}": f"{rate.bytes_per_s / 1e9:.3g} GB/s, {max(rate.flops_per_s.y) / 1e12:.3g} TFLOP/s"
            for name, rate in profile.host_formats.items()
        },
        "call of the host": f"{profile.host_call_s * 1e6:.3g} us from Python, beside its experts",
        "block in Python": f"{profile.eager_block_s * 1e6:.3g} us without experts, one kernel after the other",
        "decode step": f"{profile.step_s * 1e6:.3g} us beside its blocks",
        "gpu": "none" if gpu is None else str(machine.gpu),
    }
    if gpu is not None:
        for name, fit in (("to the GPU", gpu.h2d), ("from the GPU", gpu.d2h), ("round trip", gpu.round_trip)):
            rate = "" if fit.s_per_unit == 0 else f" + {1e-9 / fit.s_per_unit:.3g} GB/s"
            rows[name] = f"{fit.alpha_s * 1e6:.3g} us{rate}, r2 {fit.r2:.4f}"
        rows |= {
            "block in a graph": f"{gpu.block_overhead_s * 1e6:.3g} us without experts",
            "expert layer": f"{gpu.decode_layer_s * 1e6:.3g} us in a graph, {(gpu.prompt.plan_s + gpu.prompt.layer_s) * 1e6:.3g} "
            f"us for long prompts, beside its experts; the host is held up by {gpu.prompt.host_s * 1e6:.3g} us, "
            f"the bus by {gpu.prompt.fetch_s * 1e6:.3g}",
            "zero-copy": f"{gpu.zero_copy_bytes_per_s / 1e9:.3g} GB/s",
            "GPU experts": f"{gpu.expert.bytes_per_s / 1e9:.3g} GB/s with few tokens, "
            f"{max(gpu.expert.flops_per_s.y) / 1e12:.3g} TFLOP/s with many",
            "host beside copies": f"{gpu.host_while_copying.first:.2f}x as long, "
            f"copies {gpu.host_while_copying.second:.2f}x",
            "GPU beside copies": f"{gpu.gpu_while_copying.first:.2f}x as long, "
            f"copies {gpu.gpu_while_copying.second:.2f}x",
        }
    rows |= {f"noisy {i}": str(noise) for i, noise in enumerate(profile.noisy, 1)}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
