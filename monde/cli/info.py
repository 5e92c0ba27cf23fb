"""`monde info`: what this machine offers and what monde would use of it, and why."""

from __future__ import annotations

import typer

from monde.cli.options import BackendName, BackendOption


def info(backend: BackendOption = BackendName.AUTO) -> None:
    """Show what would run here and why: host backend and instruction set, threads, huge pages, CUDA.

    [bold]Examples[/bold]

      monde info

      MONDE_CPU_ISA=avx2 monde info
    """
    import psutil

    from hostcompute import env
    from hostcompute.backends.select import choose
    from hostcompute.topology import allowed_cores, default_cores
    from monde.cli.machine import Machine, cuda_or_why_not, huge_pages

    choice = choose(backend.value)
    num_threads, num_allowed = len(default_cores()), len(allowed_cores())
    free_gib = psutil.virtual_memory().available / 2**30
    machine = Machine.here()
    rows = {
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "python": machine.python,
        "cpu": f"{machine.cpu}, {machine.num_cores} cores",
        "host memory": f"{free_gib:.1f} of {machine.memory_bytes / 2**30:.1f} GiB free",
        "host backend": f"{choice.name}, {choice.isa}: {choice.why}",
        "host threads": f"{num_threads} of {num_allowed} cores that this process may use",
        "huge pages": huge_pages(),
        "cuda": cuda_or_why_not(),
    }
    rows |= env.in_force()
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{name:<{width}}  {value}")
