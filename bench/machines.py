"""What to expect of two models on machines one can buy: `monde plan` over the described machines.

    python -m bench.machines [--out results.json]

Two budgets a machine: 90% of the card, and half of that; a context of 4096 tokens, one sequence, a prompt of 512.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import artefact
from bench.decode.shapes import config_of
from monde.cli.plan_forecast import Question
from monde.planning.forecast import with_one_more_channel
from monde.planning.formats import format_named
from monde.planning.machines import DESCRIBED
from monde.planning.profile import HardwareProfile
from monde.sizes import format_bytes, format_number


@dataclass(frozen=True)
class Model:
    """name: of bench.decode.shapes. architecture: what transformers calls it, which a configuration alone does not."""

    name: str
    title: str
    architecture: str


# One that fills a workstation, and one whose 12 GiB of experts every laptop holds.
MODELS = (
    Model("qwen3", "Qwen3-30B-A3B", "Qwen3MoeForCausalLM"),
    Model("olmoe", "OLMoE-1B-7B", "OlmoeForCausalLM"),
)
MACHINES = ("laptop-4060", "epyc-4090", "desktop-5090", "xeon-2s-a100", "h200")
CARD_SHARES = (0.9, 0.45)
_HEADER = (
    "| machine | gpu_memory | resident | decode | limit | prompt | limit | one more GiB | one more channel |"
)


def all_rows() -> list[dict[str, Any]]:
    rows = []
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(model.name, None, toy=False)
            config.architectures = [model.architecture]
            config.save_pretrained(folder)
            rows += [{"model": model.title} | row for name in MACHINES for row in rows_of(folder, name)]
    return rows


def rows_of(folder: str, name: str) -> list[dict[str, Any]]:
    """The model whose config.json lies in `folder` on one machine, a row a budget."""
    profile: HardwareProfile = DESCRIBED[name]
    assert profile.gpu is not None
    rows = []
    for share in CARD_SHARES:
        gpu_bytes = int(share * profile.gpu.memory_bytes)
        question = Question(folder, profile, profile.memory_bytes, context=4096, batch=1, prompt=512)
        verdict = question.verdict(format_named("bf16"), gpu_bytes)
        row: dict[str, Any] = {"machine": name, "gpu_bytes": gpu_bytes}
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
                "num_experts": sum(layer.num_experts for layer in outlined.size.layers),
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


def tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """A table in Markdown for every model, by its title."""
    titles = dict.fromkeys(row["model"] for row in rows)
    return {
        title: "\n".join([_HEADER, "|---" * 9 + "|", *(_line(row) for row in rows if row["model"] == title)])
        for title in titles
    }


def _line(row: dict[str, Any]) -> str:
    start = f"| {row['machine']} | {format_bytes(row['gpu_bytes'])} |"
    if "why_not" in row:
        return f"{start} does not fit: {row['why_not'].rstrip('.')} |" + " |" * 6
    channel = row["gain_of_one_more_channel"]
    return (
        f"{start} {row['num_resident'] / row['num_experts']:.0%} | "
        f"{format_number(row['decode_tokens_per_s'])} tokens/s | {row['decode_limit']} | "
        f"{format_number(row['prefill_tokens_per_s'])} tokens/s | {row['prefill_limit']} | "
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
    rows = all_rows()
    for title, table in tables(rows).items():
        print(f"**{title}**\n\n{table}\n")
    if options.out:
        configuration = {
            "models": [model.title for model in MODELS],
            "machines": MACHINES,
            "card_shares": CARD_SHARES,
        }
        artefact.write("machines", configuration, rows, options.out)


if __name__ == "__main__":
    main()
