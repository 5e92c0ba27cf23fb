"""What to expect of Qwen3-30B-A3B on machines one can buy: `monde plan` over the described machines and their formats.

    python -m bench.machines [--out results.json]

Two budgets a machine: 90% of the card, and half of it; a context of 4096 tokens, one sequence, a prompt of 512.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench import artefact
from bench.decode.shapes import config_of
from monde.cli.plan_forecast import Question
from monde.planning.forecast import with_one_more_channel
from monde.planning.formats import format_named
from monde.planning.machines import DESCRIBED
from monde.planning.profile import HardwareProfile

MACHINES = ("laptop-4060", "epyc-4090", "desktop-5090", "xeon-2s-a100", "h200")
CARD_SHARES = (0.9, 0.45)


def rows_of(model: str, name: str) -> list[dict[str, Any]]:
    profile: HardwareProfile = DESCRIBED[name]
    assert profile.gpu is not None
    rows = []
    for share in CARD_SHARES:
        gpu_bytes = int(share * profile.gpu.memory_bytes)
        question = Question(model, profile, profile.memory_bytes, context=4096, batch=1, prompt=512)
        verdict = question.verdict(format_named("bf16"), gpu_bytes)
        row: dict[str, Any] = {"machine": name, "gpu_gib": gpu_bytes / 2**30}
        if verdict.forecast is None:
            assert verdict.error is not None
            rows.append(
                row | {"why_not": verdict.error.why, "smallest_gpu_bytes": verdict.smallest_gpu_bytes}
            )
            continue
        now, outlined, channel = verdict.forecast, question.outlined(None), with_one_more_channel(profile)
        more = question.forecast(outlined, gpu_bytes + 2**30)
        faster = None if channel is None else question.forecast(outlined, gpu_bytes, channel)
        rows.append(
            row
            | {
                "num_resident": sum(now.plan.num_resident_L),
                "decode_tokens_per_s": now.decode.tokens_per_s,
                "decode_limit": now.decode.limit,
                "prefill_tokens_per_s": now.prefill.tokens_per_s,
                "prefill_limit": now.prefill.limit,
                "gain_of_one_more_gib": now.decode.step_s / more.decode.step_s,
                "gain_of_one_more_channel": None
                if faster is None
                else now.decode.step_s / faster.decode.step_s,
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        "| machine | gpu_memory | resident | decode | limit | prompt | limit | one more GiB | one more channel |"
    )
    print("|---" * 9 + "|")
    for row in rows:
        start = f"| {row['machine']} | {row['gpu_gib']:.1f} GiB |"
        if "why_not" in row:
            print(f"{start} does not fit: {row['why_not'].rstrip('.')} |" + " |" * 6)
            continue
        channel = row["gain_of_one_more_channel"]
        print(
            f"{start} {row['num_resident'] / 6144:.0%} | {row['decode_tokens_per_s']:.3g} tokens/s | "
            f"{row['decode_limit']} | {row['prefill_tokens_per_s']:.4g} tokens/s | {row['prefill_limit']} | "
            f"{row['gain_of_one_more_gib'] - 1:+.1%} | {'' if channel is None else f'{channel - 1:+.1%}'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.machines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of("qwen3", None, toy=False)
        config.architectures = ["Qwen3MoeForCausalLM"]
        config.save_pretrained(folder)
        rows = [row for name in MACHINES for row in rows_of(folder, name)]
    print_table(rows)
    if options.out:
        configuration = {"machines": MACHINES, "card_shares": CARD_SHARES}
        artefact.write("machines", configuration, rows, options.out)


if __name__ == "__main__":
    main()
