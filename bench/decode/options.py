"""What `python -m bench.decode` takes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import peers
from bench.decode.shapes import MODELS
from bench.decode.skew import SKEWS
from bench.decode.steps import Case
from monde.sizes import parse_size_bytes

CONTENDERS = ("monde", "transformers", "accelerate", "lru", "popular", "peers")
BUDGETS, TOY_BUDGETS = "8GiB,16GiB,32GiB,all", "100KiB,all"
BATCHES, CONTEXTS, TOY_CONTEXTS = "1,4,16", "512,4096", "32"
HOST_LAYERS, ACCELERATE_LAYERS = 12, 4  # 14 GiB and 5 GiB of Qwen3-30B-A3B


@dataclass(frozen=True)
class Options:
    model: str
    num_layers: int | None
    toy: bool
    device: torch.device
    contenders: tuple[str, ...]
    budgets: tuple[str, ...]
    skews: tuple[str, ...]
    cases: tuple[Case, ...]
    residency: str
    num_steps: int
    time_limit_s: float
    host_layers: int
    accelerate_layers: int
    generate: bool
    peers: tuple[peers.Peer, ...]
    out: Path | None


def parse(arguments: list[str] | None = None) -> Options:
    """Errors: SystemExit with one line, as argparse gives."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode", description="Decode of whole models, side by side."
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="qwen3",
        help="Qwen3-30B-A3B, Mixtral-8x7B or OLMoE-1B-7B (default qwen3)",
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--toy", action="store_true", help="a small model, for machines without a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--contenders", default=",".join(CONTENDERS), help=f"of {','.join(CONTENDERS)} (default all)"
    )
    parser.add_argument("--budgets", help=f'gpu_memory of monde, "all" for all resident (default {BUDGETS})')
    parser.add_argument("--skews", default=",".join(SKEWS), help=f"of {','.join(SKEWS)} (default all)")
    parser.add_argument("--batches", default=BATCHES, help=f"sequences at once (default {BATCHES})")
    parser.add_argument("--contexts", help=f"tokens in the cache (default {CONTEXTS})")
    parser.add_argument("--residency", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a case (default 40)")
    parser.add_argument(
        "--time-limit", type=float, default=500, help="seconds; no case starts later (default 500)"
    )
    parser.add_argument(
        "--host-layers", type=int, default=HOST_LAYERS, help="layers of the LRU and popular contenders"
    )
    parser.add_argument("--accelerate-layers", type=int, default=ACCELERATE_LAYERS)
    parser.add_argument(
        "--no-generate", action="store_true", help="leave out model.generate, which prefills first"
    )
    parser.add_argument("--peer-ggml", action="append", default=[], metavar="NAME[:TYPE]=PATH")
    parser.add_argument("--peer-kt", metavar="FOLDER")
    parser.add_argument("--peer-freetoken", metavar="SHARED_OBJECT")
    parser.add_argument("--out", type=Path, help="where the artefact goes (default: bench/results/)")
    args = parser.parse_args(arguments)
    try:
        batches = _numbers("--batches", args.batches)
        contexts = _numbers("--contexts", args.contexts or (TOY_CONTEXTS if args.toy else CONTEXTS))
        return Options(
            model=args.model,
            num_layers=args.layers,
            toy=args.toy,
            device=_device(args.device, args.toy),
            contenders=_among("--contenders", args.contenders, CONTENDERS),
            budgets=_budgets(args.budgets or (TOY_BUDGETS if args.toy else BUDGETS)),
            skews=_among("--skews", args.skews, SKEWS),
            cases=tuple(Case(batch, context) for context in contexts for batch in batches),
            residency=args.residency,
            num_steps=args.steps,
            time_limit_s=args.time_limit,
            host_layers=args.host_layers,
            accelerate_layers=args.accelerate_layers,
            generate=not args.no_generate,
            peers=_peers(args),
            out=args.out,
        )
    except ValueError as error:
        parser.error(str(error))


def _device(name: str, toy: bool) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: this machine has no usable GPU; use --device cpu --toy")
    if device.type == "cpu" and not toy:
        raise ValueError("--device cpu: the whole model is for a GPU; add --toy")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _peers(args: argparse.Namespace) -> tuple[peers.Peer, ...]:
    found = [peers.ggml(argument) for argument in args.peer_ggml]
    if args.peer_kt:
        found.append(peers.kt_kernel(args.peer_kt))
    if args.peer_freetoken:
        found.append(peers.freetoken(args.peer_freetoken))
    return tuple(found)


def _budgets(text: str) -> tuple[str, ...]:
    budgets = tuple(text.split(","))
    for budget in budgets:
        if budget != "all":
            parse_size_bytes(budget, "--budgets")
    return budgets


def _among(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: expected any of {', '.join(known)}, got {name!r}")
    return names


def _numbers(option: str, text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise ValueError(f"{option}: expected whole numbers above 0 with commas between, got {text!r}")
    return [int(part) for part in text.split(",")]
