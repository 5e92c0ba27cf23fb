"""`monde train`: train a mixture-of-experts model from a TOML file, on one rank or many."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from monde.training.config import TrainConfig
    from monde.training.fabric import Fabric
    from monde.training.job import StepRecord, TrainingJob

LINE_INTERVAL_S = 30.0  # a log of a day's run stays readable


def train(
    config_file: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A TOML file; docs/training.md has one.")
    ],
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over: delete the output folder's checkpoints and losses.")
    ] = False,
) -> None:
    """Train a mixture-of-experts model, its experts spread over the ranks that run this command.

    Goes on from the newest checkpoint of the output folder, on however many ranks. Leaves checkpoints, losses.jsonl,
    loss.png and, at the end, the model.

    [bold]Examples[/bold]

      monde train examples/train.toml

      torchrun --nproc-per-node 2 -m monde train examples/train.toml
    """
    from monde.training.config import read_config

    config = read_config(config_file)
    with _joined(config) as fabric:
        job = _job(config, config_file.resolve().parent, fabric, restart)
        done = job.resume()
        if fabric.is_first and done:
            typer.echo(f"monde: resuming after step {done}", err=True)
        _run(job)
        _leave(job, config, config_file.resolve().parent)


@contextmanager
def _joined(config: TrainConfig) -> Iterator[Fabric]:
    """The ranks, left in order: Gloo's threads end before the interpreter does, which may abort the process otherwise."""
    import torch.distributed as dist

    fabric = None
    try:
        fabric = _join(config)
        yield fabric
    finally:
        if fabric is not None:
            fabric.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(config: TrainConfig) -> Fabric:
    """The process group that torchrun prepared, or one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from monde.device.mesh import agree
    from monde.training.fabric import Fabric

    if not dist.is_torchelastic_launched():
        if config.parallel.nodes > 1:
            raise ValueError(
                f"parallel.nodes is {config.parallel.nodes}, but one rank runs; start it with torchrun"
            )
        return Fabric(None)
    timeout = timedelta(seconds=config.parallel.timeout_s)
    dist.init_process_group("gloo", timeout=timeout)
    agree(config.parallel.nodes, "parallel.nodes")  # before a mesh is made of it
    num_ranks, num_nodes = dist.get_world_size(), config.parallel.nodes or dist.get_world_size()
    if num_ranks % num_nodes:
        raise ValueError(
            f"parallel.nodes = {num_nodes} does not divide {num_ranks} ranks; start another number"
        )
    mesh = init_device_mesh("cpu", (num_nodes, num_ranks // num_nodes), mesh_dim_names=("node", "local"))
    return Fabric(mesh, timeout=timeout)


def _job(config: TrainConfig, base: Path, fabric: Fabric, restart: bool) -> TrainingJob:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from monde.cli.texts import token_source
    from monde.training.convert import convert
    from monde.training.job import TrainingJob

    logging.disable_progress_bar()
    folder = base / config.output.folder
    if restart:
        fabric.first_does(lambda: shutil.rmtree(folder, ignore_errors=True))
    path = _model_path(config, base)
    model_config: Any = AutoConfig.from_pretrained(path)
    check_model(config, model_config)
    torch.manual_seed(config.optimizer.seed)
    if config.model.init == "random":
        model: Any = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    text = base / config.data.text if config.data.text else None
    source = token_source(
        AutoTokenizer.from_pretrained(path), model.config.vocab_size, text, False, "data.text"
    )
    batch, length = config.optimizer.batch, config.data.sequence_length
    schedule = _schedule(config)
    model = convert(model, fabric, schedule=schedule)

    def report(line: str) -> None:
        if fabric.is_first:
            typer.echo(f"monde: {line}", err=True)

    return TrainingJob(
        model,
        fabric,
        config,
        lambda step: source.window(step, batch, length + 1),
        folder,
        report,
        source.digest,
    )


def check_model(config: TrainConfig, model_config: Any) -> None:
    """Errors: ValueError for a model that `monde train` does not train, or not on sequences of such a length."""
    if model_config.is_encoder_decoder:
        raise ValueError(
            f"model.path: {config.model.path} is an encoder-decoder; name a causal language model, or convert this one in "
            "a loop of your own (monde.training.convert)"
        )
    num_positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if num_positions is not None and config.data.sequence_length > num_positions:
        raise ValueError(
            f"data.sequence_length is {config.data.sequence_length}, the model has {num_positions} positions; ask for no more, "
            "or raise max_position_embeddings in its config.json"
        )


def _schedule(config: TrainConfig) -> Any:
    from monde.planning.pipeline import Degrees

    chunks = config.parallel.chunks
    return Degrees() if chunks == "auto" else Degrees(*chunks)


def _model_path(config: TrainConfig, base: Path) -> str:
    return str(base / config.model.path) if (base / config.model.path).is_dir() else config.model.path


def _run(job: TrainingJob) -> None:
    """With a bar on the first rank's standard error; where that is no terminal, a line now and then."""
    from rich.console import Console

    console = Console(stderr=True)
    if not job.fabric.is_first:
        for _ in job.run():
            pass
    elif console.is_terminal:
        _run_with_bar(job, console)
    else:
        for line in progress_lines(job.run(), job.config.optimizer.steps):
            typer.echo(f"monde: {line}", err=True)


def _run_with_bar(job: TrainingJob, console: Console) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=job.config.optimizer.steps, completed=job.next_step)
        for record in job.run():
            progress.update(bar, advance=1, description=_figures(record))


def progress_lines(
    records: Iterable[StepRecord], num_steps: int, clock_s: Callable[[], float] = time.monotonic
) -> Iterator[str]:
    """Of the first step, of the last, and between them of a step every LINE_INTERVAL_S, for a log."""
    told_s = -math.inf
    for record in records:
        is_last = record.step + 1 == num_steps
        if is_last or clock_s() - told_s >= LINE_INTERVAL_S:
            told_s = clock_s()
            yield f"step {record.step + 1} of {num_steps}, {_figures(record)}"


def _figures(record: StepRecord) -> str:
    return f"loss {record.loss:.4f}, {record.num_tokens / record.seconds_s:,.0f} tokens/s"


def _leave(job: TrainingJob, config: TrainConfig, base: Path) -> None:
    """Curve and model; the model is whole again and an ordinary transformers folder."""
    from transformers import AutoTokenizer

    from monde.training.convert import restore
    from monde.training.curve import draw_losses
    from monde.training.job import LOSSES, read_losses

    model: Any = restore(job.model)

    def write() -> None:
        records = read_losses(job.folder / LOSSES)
        title = f"{Path(config.model.path).name}, {len(records)} steps on {job.fabric.num_ranks} ranks"
        draw_losses(records, title, job.folder / "loss.png")
        model.save_pretrained(job.folder / "model")
        AutoTokenizer.from_pretrained(_model_path(config, base)).save_pretrained(job.folder / "model")
        typer.echo(
            f"loss {records[0].loss:.4f} -> {records[-1].loss:.4f} in {len(records)} steps; "
            f"{job.folder}/loss.png, {job.folder}/model"
        )

    job.fabric.first_does(write)
