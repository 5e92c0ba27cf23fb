"""Decode steps with shared experts beside the routed ones and in the model's order, in turns.

    python -m bench.shared_experts                      six layers of Qwen1.5-MoE-A2.7B (D=2048, 60 experts of F=1408,
                                                        top-4, a shared expert of F=5632), random weights
    python -m bench.shared_experts --toy --device cpu   the same code on a small model, where nothing runs beside

The most that there is to gain: what the shared expert's kernels take, where the GPU would else wait for the host.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import Qwen2MoeConfig

import monde
from bench import artefact
from bench.decode import models
from bench.decode.steps import Case, Decoding, StaticSteps

SHARES = (0.0, 0.5, 1.0)  # of the experts are resident
WAYS = ("beside", "in order")
NUM_WARM_UPS, NUM_ROUNDS, STEPS_A_ROUND = 40, 5, 20


def config_of(num_layers: int, toy: bool) -> Any:
    dims: dict[str, Any] = {
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "vocab_size": 151936,
    }
    if toy:
        dims |= {"hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
        dims |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8, "vocab_size": 256}
    return Qwen2MoeConfig(num_hidden_layers=num_layers, dtype=torch.bfloat16, **dims)


def offloaded(
    config: Any, dense: Any, device: torch.device, way: str, gpu_bytes: int | None, case: Case
) -> Any:
    model = models.build(config, dense, device, models.windowed)
    settings: dict[str, Any] = {
        "device": str(device),
        "residency": "static",
        "max_context": case.num_positions,
        "max_batch": case.batch,
    }
    if gpu_bytes is not None:
        settings["gpu_memory"] = gpu_bytes
    if way == "beside":
        return monde.offload(model, **settings)
    with patch("monde.models.hand_over.run_shared_beside"):
        return monde.offload(model, **settings)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.shared_experts", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batches", default="1,4", help="comma-separated (default 1,4)")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where the artefact goes (default: bench/results/)")
    args = parser.parse_args(arguments)
    device, config = torch.device(args.device), config_of(args.layers, args.toy)
    dense = models.make_dense(config, device)
    rows = []
    print("| resident | batch | beside ms | in order ms | gain |\n|---|---|---|---|---|")
    for batch in (int(b) for b in args.batches.split(",")):
        case = Case(batch, 32 if args.toy else 512)
        whole = offloaded(config, dense, device, "beside", None if device.type == "cuda" else 0, case)
        plan = whole.monde.plan
        others_bytes = plan.gpu_used_bytes - plan.slots_bytes
        whole.monde.close()
        del whole
        for share in SHARES:
            gpu_bytes = others_bytes + int(share * plan.size.all_slots_bytes)
            decodings = {}
            for way in WAYS:
                model = offloaded(config, dense, device, way, gpu_bytes, case)
                decodings[way] = Decoding(StaticSteps(model, case), config.vocab_size, batch, device)
                decodings[way].run(NUM_WARM_UPS)
            samples: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(NUM_ROUNDS):
                for way in WAYS:
                    samples[way] += decodings[way].run(STEPS_A_ROUND)
            beside_s, in_order_s = (statistics.median(samples[way]) for way in WAYS)
            print(
                f"| {share:.0%} | {batch} | {beside_s * 1e3:.3f} | {in_order_s * 1e3:.3f} "
                f"| {in_order_s / beside_s - 1:+.1%} |",
                flush=True,
            )
            rows.append({"share": share, "batch": batch, "context": case.context, "samples_s": samples})
    configuration = {"layers": args.layers, "toy": args.toy, "device": str(device)}
    configuration["gpu"] = torch.cuda.get_device_name() if device.type == "cuda" else None
    print(f"artefact: {artefact.write('shared_experts', configuration, rows, args.out)}")


if __name__ == "__main__":
    main()
