"""Attention of decode steps: monde's kernel, what transformers calls, and the time that reading what is seen takes.

    python -m bench.decode_attention            heads of several models, batches, contexts; in one CUDA graph

Caches have room for twice the context. Layers take turns with caches of their own, so that none is found in L2.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench import artefact
from bench.decode.layers import hbm_read_bytes_per_s
from monde.models.gpu_attention import attention

HEADS = {  # of a layer: queries, keys and values, dims
    "Qwen3-30B-A3B": (32, 4, 128),
    "Mixtral-8x7B": (32, 8, 128),
    "Qwen1.5-MoE": (16, 16, 128),
}
MIN_BYTES = 256 << 20  # of the caches that take turns
MAX_CACHES, NUM_REPEATS = 32, 20
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """Microseconds a layer."""

    model: str
    batch: int
    context: int
    monde_us: float
    torch_us: float
    bound_us: float
    monde_samples_us: list[float]
    torch_samples_us: list[float]


class Layer(nn.Module):
    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_groups


def layer_us(functions: list[Callable[[], Tensor]]) -> list[float]:
    """Of each repeat of a graph that calls all functions."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for function in functions:
            function()
    side.synchronize()
    with torch.cuda.graph(graph, stream=side):
        for function in functions:
            function()
    samples = []
    for i in range(NUM_REPEATS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            samples.append(begin.elapsed_time(end) * 1e3 / len(functions))
    return samples


@torch.inference_mode()
def measure(name: str, batch: int, context: int, hbm_bytes_per_s: float) -> Row:
    H, N, C = HEADS[name]
    room, seen_bytes = 2 * context, 2 * batch * N * context * C * DTYPE.itemsize
    num_caches = max(2, min(MAX_CACHES, MIN_BYTES // seen_bytes))
    caches = [torch.randn(2, batch, N, room, C, device="cuda", dtype=DTYPE) for _ in range(num_caches)]
    mask = (torch.arange(room, device="cuda") < context).expand(batch, 1, 1, room).contiguous()
    q, layer = torch.randn(batch, H, 1, C, device="cuda", dtype=DTYPE), Layer(H // N)

    def calls(function: Callable[..., tuple[Tensor, None]]) -> list[Callable[[], Tensor]]:
        return [lambda c=cache: function(layer, q, c[0], c[1], mask)[0] for cache in caches]  # type: ignore[misc]

    mine, theirs = layer_us(calls(attention)), layer_us(calls(sdpa_attention_forward))
    return Row(
        name,
        batch,
        context,
        statistics.median(mine),
        statistics.median(theirs),
        seen_bytes / hbm_bytes_per_s * 1e6,
        mine,
        theirs,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode_attention", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--batches", default="1,4,16", help="comma-separated (default 1,4,16)")
    parser.add_argument("--contexts", default="512,4096,32768", help="tokens seen (default 512,4096,32768)")
    parser.add_argument("--out", type=Path, help="where the artefact goes (default: bench/results/)")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU")
    hbm = hbm_read_bytes_per_s()
    rows = []
    print(
        "| heads of | batch | context | monde us | torch us | read us | of the bound |\n" + "|---" * 7 + "|"
    )
    for name in HEADS:
        for batch in map(int, args.batches.split(",")):
            for context in map(int, args.contexts.split(",")):
                row = measure(name, batch, context, hbm)
                rows.append(row)
                print(
                    f"| {name} | {batch} | {context} | {row.monde_us:.1f} | {row.torch_us:.1f} | {row.bound_us:.1f} "
                    f"| {row.bound_us / row.monde_us:.0%} |",
                    flush=True,
                )
                torch.cuda.empty_cache()
    configuration = {"batches": args.batches, "contexts": args.contexts, "gpu": torch.cuda.get_device_name()}
    results = {"hbm_read_bytes_per_s": hbm, "rows": [asdict(row) for row in rows]}
    print(f"artefact: {artefact.write('decode_attention', configuration, results, args.out)}")


if __name__ == "__main__":
    main()
