"""`monde generate`: text out."""

from __future__ import annotations

import os
import sys
import time
import warnings
from typing import TYPE_CHECKING, Annotated, Any

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
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def generate(
    model: ModelArgument,
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help="The text to continue; - reads it from standard input.", show_default=False
        ),
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after this many tokens.")
    ] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**32 - 1, help="Makes sampling repeatable; matters above temperature 0."),
    ] = 0,
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
    """Continue PROMPT, word by word on standard output.

    Timing and what runs where go to standard error, so the text can be piped.

    [bold]Examples[/bold]

      monde generate assets/moe-3m "It is a truth universally acknowledged"

      monde generate Qwen/Qwen3-30B-A3B "The moon" --gpu-memory 16GiB -n 64 --temperature 0.7 --seed 1

      monde generate ./my-model - --device cpu < prompt.txt

      monde generate MODEL "The moon" --save-heat moon.heat     # then: --heat moon.heat, of bench and plan too

      torchrun --nproc-per-node 2 -m monde generate MODEL "The moon"     # the experts lie on both ranks
    """
    if seed and not temperature:
        warnings.warn(
            f"--seed {seed} changes nothing: at temperature 0 nothing is drawn; give a --temperature above 0",
            stacklevel=1,
        )
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise ValueError(
            f"{model} has no tokenizer to read PROMPT with; put tokenizer.json next to config.json"
        )
    inputs = tokenizer(read_prompt(prompt), return_tensors="pt", return_token_type_ids=False, verbose=False)
    num_tokens = inputs["input_ids"].shape[1]
    if num_tokens == 0:
        raise ValueError("PROMPT is empty; give at least one word to continue")
    check_prompt(model, inputs["input_ids"], max_new_tokens)

    from transformers import set_seed

    from monde.cli.observe import Observed
    from monde.cli.ranks import refuse_over_ranks, torchrun_mesh

    observed = Observed(save_heat, record_routing)
    observed.check()
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    with torchrun_mesh(device) as mesh:
        if mesh is not None:
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
            max_context=num_tokens + max_new_tokens,
            residency=residency,
            heat_file=heat,
            mesh=mesh,
            parallel=parallel,
            split_policy=split_policy,
            deferred_experts=deferred_experts,
        )
        loaded: Any = options.load_with_monde()
        set_seed(seed)  # the same on all ranks, which go on with the same token
        is_first = mesh is None or mesh.get_local_rank() == 0
        streamer = timed_streamer(tokenizer) if is_first else None
        with observed.of(loaded.monde, model):
            loaded.generate(
                **inputs.to(loaded.device), max_new_tokens=max_new_tokens, streamer=streamer, **sampling
            )
        if streamer is not None:
            typer.echo(_summary(streamer.token_times_s, loaded.monde), err=True)
        for line in observed.told():
            typer.echo(line, err=True)


def read_prompt(prompt: str) -> str:
    """PROMPT, or standard input for "-".

    Errors: ValueError for bytes that are not UTF-8, for a closed input, and for an input that ranks would share.
    """
    if prompt == "-" and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # as torchrun sets it
        raise ValueError(
            "standard input reaches one process, and torchrun started several; give the prompt as an argument"
        )
    if prompt == "-" and sys.stdin is None:
        raise ValueError("standard input is closed; give the prompt as an argument, or pipe it in")
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode()
        prompt.encode()  # the shell's bytes that are not UTF-8 arrive as lone surrogates
    except UnicodeError as error:
        raise ValueError(f"PROMPT is not UTF-8 text ({error}); convert it, for example with iconv") from error
    return prompt


def check_prompt(model: str, ids_BT: Tensor, max_new_tokens: int) -> None:
    """Errors: ValueError when prompt and answer are longer than the model's positions, or of another vocabulary."""
    from monde.cli.texts import check_vocabulary
    from monde.models.configuration import read_configuration
    from monde.models.positions import positions_of

    config, num_tokens = read_configuration(model), ids_BT.shape[1]
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    if vocab_size:
        check_vocabulary(ids_BT, vocab_size)
    num_positions, longest = positions_of(config), num_tokens + max_new_tokens
    if config.is_encoder_decoder:  # one half holds the prompt, the other the answer
        longest = max(num_tokens, max_new_tokens + 1)
    if num_positions is not None and longest > num_positions:
        raise ValueError(
            f"PROMPT has {num_tokens} tokens and -n asks for {max_new_tokens} more; {model} has "
            f"{num_positions} positions; shorten PROMPT or lower -n"
        )


def timed_streamer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A text streamer that also notes when the prompt went in and each token came out, as `token_times_s`."""
    from transformers import TextStreamer

    class TimedStreamer(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.token_times_s: list[float] = []

        def put(self, value: Any) -> None:
            self.token_times_s.append(time.perf_counter())
            super().put(value)  # type: ignore[no-untyped-call]

    return TimedStreamer()


def _summary(token_times_s: list[float], engine: Any) -> str:
    """The first time is the prompt's, each further one a token's."""
    num_tokens = len(token_times_s) - 1
    first_s = token_times_s[1] - token_times_s[0]
    line = f"monde: first token after {first_s:.3f} s"
    if num_tokens > 1:
        tokens_per_s = (num_tokens - 1) / (token_times_s[-1] - token_times_s[1])
        line += f", then {tokens_per_s:.1f} tokens/s over {num_tokens} tokens"
    report, choice = engine.load_report, engine.host_choice
    where = f"experts on the host ({choice.name}, {choice.isa})"
    if report.num_resident_experts == report.num_experts:
        where = f"all {report.num_experts} experts on {engine.device}"
    elif report.num_resident_experts:
        resident = f"{report.num_resident_experts} of {report.num_experts} experts on {engine.device}"
        where = f"{resident}, the other {where}"
    if report.num_released_experts:
        where += f"; {engine.plan.released_text}"
    return f"{line}; {where}; loaded in {report.seconds_s:.1f} s"
