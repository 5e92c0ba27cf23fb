"""Measure how popular experts are on a trained model and write popularity.json.

    python -m bench.decode.popularity MODEL TEXT...

Popularity within a sequence: texts are cut into 512 tokens, experts of each are sorted by their share of the pairs,
and the sorted shares are averaged. Over all texts together popularity is flatter, because texts differ.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.decode.skew import MEASURED
from bench.residency import record
from monde.routing.trace import Trace

SEQUENCE = 512


def share_within_sequences(trace: Trace) -> NDArray[np.float64]:
    """share_LE, sorted from the most popular down."""
    sequences = [trace.steps[i : i + SEQUENCE] for i in range(0, len(trace.steps), SEQUENCE)]
    rows = []
    for l, num_experts in enumerate(trace.num_experts_L):
        counts = [
            np.bincount(np.concatenate([step[l].ravel() for step in steps]), minlength=num_experts)
            for steps in sequences
            if len(steps) == SEQUENCE
        ]
        rows.append(np.mean([np.sort(count)[::-1] / count.sum() for count in counts], axis=0))
    return np.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", type=Path)
    args = parser.parse_args()
    trace, _ = record(args.model, args.texts, num_documents=4)
    share_LE = share_within_sequences(trace)
    told = {
        "model": trace.model,
        "texts": sorted(text.name for text in args.texts),
        "num_sequences": len(trace.steps) // SEQUENCE,
        "tokens_per_sequence": SEQUENCE,
        "share_LE": [[round(float(share), 6) for share in share_E] for share_E in share_LE],
    }
    MEASURED.write_text(json.dumps(told) + "\n")
    quarter = share_LE[:, : share_LE.shape[1] // 4].sum(1).mean()
    print(f"{MEASURED.name}: the busiest quarter takes {quarter:.2f} of the pairs of a sequence")


if __name__ == "__main__":
    main()
