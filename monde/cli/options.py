"""The options that `generate` and `bench` share, and what they load."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class DTypeName(StrEnum):
    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class BackendName(StrEnum):
    AUTO = "auto"
    NATIVE = "native"
    NUMBA = "numba"
    REFERENCE = "reference"


class ResidencyName(StrEnum):
    DYNAMIC = "dynamic"
    LRU = "lru"
    STATIC = "static"
    UNIFORM = "uniform"


class SplitPolicyName(StrEnum):
    BEST = "best"
    MONDE_RULE = "monde-rule"
    FIDDLER = "fiddler"
    TWO_ENDED = "two-ended"
    ALL_HOST = "all-host"
    ALL_FETCH = "all-fetch"


class ParallelName(StrEnum):
    SHARDED = "sharded"
    PEERS = "peers"
    AUTO = "auto"


class OutputFormat(StrEnum):
    MD = "md"
    CSV = "csv"
    JSON = "json"
    JSONL = "jsonl"


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder or a hub id.", show_default=False)
]
GpuMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Limit for the GPU: dense weights, KV cache, workspace and resident experts, as 16GiB."
    ),
]
HostMemoryOption = Annotated[
    str | None, typer.Option(help="Limit for the experts kept in host memory, as 100GiB.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Where dense weights run: cuda:0 or cpu.", show_default="the first GPU, else cpu"),
]
DTypeOption = Annotated[DTypeName, typer.Option(help="Weights; auto is the checkpoint's own.")]
BackendOption = Annotated[BackendName, typer.Option(help="Kernels for the experts on the host.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="CPU threads.", show_default="all physical cores")
]

ResidencyOption = Annotated[
    ResidencyName, typer.Option(help="Who has a slot on the GPU: who starts there, or follow the routing.")
]
SplitPolicyOption = Annotated[
    SplitPolicyName,
    typer.Option(help="How prompts' experts are split between GPU and host: others' rules, to compare with."),
]
HeatOption = Annotated[
    Path | None, typer.Option(help="A heat file: who is resident at first.", show_default="first experts")
]
SaveHeatOption = Annotated[
    Path | None,
    typer.Option(help="Write how often each expert was asked for, for --heat.", show_default=False),
]
RecordRoutingOption = Annotated[
    Path | None,
    typer.Option(
        help="Write what the routers asked for, step by step, for `monde plan --routing`.", show_default=False
    ),
]
DeferredOption = Annotated[
    int,
    typer.Option(
        "--deferred-experts",
        min=0,
        metavar="N",
        help="Add the N lightest experts of a token one layer later in decode; changes the answer.",
    ),
]
ParallelOption = Annotated[
    ParallelName,
    typer.Option(
        help="Under torchrun: cut every expert, spread whole ones, or hold both and choose per batch."
    ),
]


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model; None leaves a choice to monde."""

    model: str
    gpu_memory: str | None = None
    host_memory: str | None = None
    device: str | None = None
    dtype: DTypeName = DTypeName.AUTO
    backend: BackendName = BackendName.AUTO
    num_threads: int | None = None
    max_context: int | None = None  # what the run will need; gpu_memory must leave room for it
    max_batch: int | None = None
    residency: ResidencyName = ResidencyName.DYNAMIC
    heat_file: Path | None = None
    mesh: Any = None  # ranks that hold the experts together
    parallel: ParallelName = ParallelName.SHARDED
    split_policy: SplitPolicyName = SplitPolicyName.BEST
    deferred_experts: int = 0

    def torch_dtype(self) -> Any:
        """What from_pretrained takes as `dtype`."""
        import torch

        named = {DTypeName.BF16: torch.bfloat16, DTypeName.FP16: torch.float16, DTypeName.FP32: torch.float32}
        return named.get(self.dtype, "auto")

    def load_with_monde(self) -> PreTrainedModel:
        """Errors: ValueError or OSError, naming the remedy, when the model cannot be had or does not fit."""
        import torch

        from monde.models.loading import from_pretrained

        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        lengths = {"max_context": self.max_context, "max_batch": self.max_batch}
        return from_pretrained(
            self.model,
            **{name: value for name, value in lengths.items() if value is not None},
            gpu_memory=self.gpu_memory,
            host_memory=self.host_memory,
            device=self.device,
            cpu_backend=self.backend.value,
            num_threads=self.num_threads,
            residency=self.residency.value,
            heat_file=self.heat_file,
            split_policy=self.split_policy.value,
            mesh=self.mesh,
            parallel=self.parallel.value,
            deferred_experts=self.deferred_experts,
            dtype=self.torch_dtype(),
        )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None when its folder holds none.

    Errors: those of read_configuration, as the tokenizer follows it; ValueError when the tokenizer is damaged.
    """
    from transformers import AutoTokenizer

    from monde.models.configuration import read_configuration

    read_configuration(model)
    folder = Path(model)
    if folder.is_dir() and not any(
        (folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # tokenizers raises nothing more specific for a damaged file
        raise ValueError(
            f"{model}: its tokenizer cannot be read ({error}); copy or download its files again"
        ) from error
    return tokenizer
