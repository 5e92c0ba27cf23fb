"""Residency policies on real routing: record a model's routers over texts, replay every policy.

    python bench/residency.py MODEL TEXT... [--out results.json]

Decode is played token by token. Of each text the first documents (split at <|endoftext|>) are replayed, the next as
many make the heat of the static policy. MODEL is one whose forward returns router_logits.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import artefact
from monde.planning.budget import LayerSize
from monde.routing.heat import HeatTracker
from monde.routing.replay import DynamicSettings, Residency, replay
from monde.routing.trace import Trace, TraceRecorder

NUM_TOKENS, MIN_CHARS = 512, 4000  # of a document


def record(model_path: str, texts: list[Path], num_documents: int) -> tuple[Trace, Trace]:
    """(to replay, for heat): `num_documents` of every text each."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    config = model.config
    num_experts = getattr(config, "num_experts", None) or config.num_local_experts
    recorders = tuple(TraceRecorder([num_experts] * config.num_hidden_layers) for _ in range(2))
    for text in texts:
        documents = [d for d in text.read_text().split("<|endoftext|>") if len(d) >= MIN_CHARS]
        for i, document in enumerate(documents[: 2 * num_documents]):
            ids = tokenizer(document, return_tensors="pt", truncation=True, max_length=NUM_TOKENS).input_ids
            with torch.no_grad():
                logits_L = model(ids, output_router_logits=True).router_logits
            topk_L = [logits_TE.float().topk(config.num_experts_per_tok) for logits_TE in logits_L]
            recorder = recorders[i // num_documents]
            for t in range(ids.shape[1]):
                recorder.step()
                for l, topk_TK in enumerate(topk_L):
                    recorder.record(l, topk_TK.indices[t : t + 1], torch.ones_like(topk_TK.values[t : t + 1]))
    replayed, heat = (recorder.finish(Path(model_path).name) for recorder in recorders)
    return replayed, heat


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--documents", type=int, default=2, help="of each text, replayed and for heat")
    parser.add_argument("--out", type=Path, help="where to write the artefact")
    args = parser.parse_args()
    trace, other = record(args.model, args.texts, args.documents)
    tracker = HeatTracker(other.num_experts_L, half_life_steps=1e9)
    for step in other.steps:
        tracker.step()
        for l, ids_TK in enumerate(step):
            tracker.update(l, ids_TK, np.ones(ids_TK.shape, np.float32))
    heat = tracker.read(other.model)
    layers = [LayerSize(n, 1, 1) for n in trace.num_experts_L]
    results = []
    print("| policy | share of experts | found on the device | swaps a step |\n|---|---|---|---|")
    for share in (0.25, 0.5):
        for policy in Residency:
            got = replay(trace, policy, layers, int(share * sum(trace.num_experts_L)), heat)
            swaps = got.num_swaps / len(trace.steps)
            print(f"| {policy.value} | {share} | {got.hit_rate:.3f} | {swaps:.2f} |")
            results.append(
                {"policy": policy.value, "share": share, "hit_rate": got.hit_rate, "swaps_per_step": swaps}
            )
    configuration = {
        "model": trace.model,
        "texts": [text.name for text in args.texts],
        "num_documents": args.documents,
        "num_steps": len(trace.steps),
        "dynamic": dataclasses.asdict(DynamicSettings()),
    }
    artefact.write("residency", configuration, results, args.out)


if __name__ == "__main__":
    main()
