"""The `monde` command."""

from __future__ import annotations

from typing import Annotated

import typer

from monde import __version__
from monde.cli.bench import bench
from monde.cli.calibrate import calibrate
from monde.cli.errors import OneLineErrors
from monde.cli.generate import generate
from monde.cli.info import info
from monde.cli.plan import plan
from monde.cli.ranks import on_first_rank
from monde.cli.train import train

EPILOG = (
    "Environment: MONDE_CPU_ISA forces one instruction set, MONDE_NUM_THREADS the number of host threads, "
    "MONDE_DEBUG=1 shows tracebacks."
)

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
app.command()(generate)
app.command()(bench)
app.command()(on_first_rank(plan))
app.command()(on_first_rank(calibrate))
app.command()(train)
app.command()(on_first_rank(info))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"monde {__version__}")
        raise typer.Exit


@app.callback()
def monde(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Run mixture-of-experts models larger than the GPU.

    Hot experts live on the GPU; cold experts, or all without a GPU, are computed in host memory.

    Start with: monde generate MODEL "Once upon a time"
    """
