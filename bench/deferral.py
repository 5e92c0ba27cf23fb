"""What expert deferral costs in quality, on trained models, and what it could gain: teacher-forced decode, text by text.

    python -m bench.deferral [MODEL...] [--texts TEXT...] [--out results.json]

Of every text, windows of 512 tokens; the first 32 are the prompt, which is never deferred, each further one a decode
step with the text's own token. Every number of deferred experts is compared with none: perplexity, the share of
positions whose likeliest token stays the same, and the divergence KL(none || deferred). Next to it the same pairs are
left out altogether, which is what deferral must beat. fp32, so that nothing else differs.

The gain is a bound by arithmetic from a recorded run of bench.decode, not a measurement. The artefact grows text by
text; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

import monde
from bench import artefact
from monde.models.sizing import topk_of

ROOT = Path(__file__).parents[1]
MODEL, TEXT = ROOT / "assets" / "moe-3m", ROOT / "monde" / "cli" / "text" / "literature.txt"
DECODE_RUN = artefact.RESULTS / "decode_16gib_gpu_machine.json"
NUM_TOKENS, NUM_PROMPT, NUM_WINDOWS = 512, 32, 8


@dataclass(frozen=True)
class Way:
    """How the lightest experts of a token are treated: "deferred" or "left out"."""

    name: str
    num_experts: int

    def __str__(self) -> str:
        return f"{self.num_experts} {self.name}"


@dataclass(frozen=True)
class Quality:
    """One model on one text. nll_W: mean negative log likelihood per token of every window, in nats."""

    model: str
    text: str
    way: Way
    nll_W: list[float]
    same_greedy: float
    kl: float

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.nll_W) / len(self.nll_W))


def windows(tokens: Sequence[int], num_windows: int = NUM_WINDOWS) -> Tensor:
    """[num_windows, NUM_TOKENS], evenly spaced over the text. Errors: ValueError for a text that is too short."""
    if len(tokens) < num_windows * NUM_TOKENS:
        raise ValueError(f"the text has {len(tokens)} tokens, {num_windows * NUM_TOKENS} are needed")
    stride = len(tokens) // num_windows
    return torch.tensor([tokens[w * stride : w * stride + NUM_TOKENS] for w in range(num_windows)])


def load(folder: Path, way: Way) -> Any:
    model: Any = monde.from_pretrained(
        str(folder), device="cpu", dtype=torch.float32, deferred_experts=way.num_experts
    )
    if way.name == "left out":
        model.monde.deferred.take = lambda: None
    return model


@torch.no_grad()
def decode(model: Any, ids_WT: Tensor) -> Iterator[Tensor]:
    """Log probabilities [W, V] of the token after each position from NUM_PROMPT on, step by step."""
    cache = model(ids_WT[:, :NUM_PROMPT], use_cache=True).past_key_values
    for t in range(NUM_PROMPT, ids_WT.shape[1] - 1):
        logits_WV = model(ids_WT[:, t : t + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        yield logits_WV.log_softmax(-1)


def judge(models: dict[Way, Any], model_name: str, text: str, ids_WT: Tensor) -> list[Quality]:
    """All ways side by side, as logits of all positions would not fit in memory. The first way is the reference."""
    nll: dict[Way, list[Tensor]] = {way: [] for way in models}
    same: dict[Way, list[Tensor]] = {way: [] for way in models}
    kl: dict[Way, list[Tensor]] = {way: [] for way in models}
    steps = zip(*(decode(model, ids_WT) for model in models.values()), strict=True)
    for t, log_p in enumerate(steps, NUM_PROMPT + 1):
        exact_WV = log_p[0]
        for way, way_WV in zip(models, log_p, strict=True):
            nll[way].append(-way_WV.gather(1, ids_WT[:, t : t + 1])[:, 0])
            same[way].append((way_WV.argmax(-1) == exact_WV.argmax(-1)).float())
            kl[way].append((exact_WV.exp() * (exact_WV - way_WV)).sum(-1))

    def mean(values: list[Tensor]) -> float:
        return float(torch.stack(values).double().mean())

    return [
        Quality(
            model_name,
            text,
            way,
            torch.stack(nll[way]).double().mean(0).tolist(),
            mean(same[way]),
            mean(kl[way]),
        )
        for way in models
    ]


@dataclass(frozen=True)
class Step:
    """A recorded decode step: in all, of the host computing, and the bus' part of cold experts."""

    total_s: float
    host_s: float
    bus_share: float
    host_slowdown: float  # of the host by the bus' reading

    def deferred_s(self, share: float) -> float:
        """Least time of the step when this share of the cold pairs is deferred.

        Deferred pairs hide where the host was idle, and no more. The bus reads its part of cold experts only while the
        GPU waits for them, so of deferred ones the host reads all.
        """
        now_s = (1 - share) * self.host_s
        later_s = share * self.host_s / (1 - self.bus_share) / self.host_slowdown
        return now_s + max(self.total_s - self.host_s, later_s)


def recorded_steps(record: dict[str, Any]) -> dict[str, Step]:
    """By skew, of an artefact of bench.decode."""
    top, steps = record["results"]["ceilings"], {}
    for row in record["results"]["rows"]:
        if row["contender"] == "monde":
            figures = row["figures"]
            host_bytes, bus_bytes = figures["host_weight_bytes_per_step"], figures["h2d_bytes_per_step"]
            steps[row["skew"]] = Step(
                row["median_s"],
                figures["host_busy_s_per_step"],
                bus_bytes / (host_bytes + bus_bytes),
                top["host_read_bytes_per_s"] / top["overlapped_host_bytes_per_s"],
            )
    return steps


def gains(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What each number of deferred experts could gain at most, by arithmetic."""
    num_topk = record["configuration"]["shape"]["num_topk"]
    return [
        {"skew": skew, "num_experts": n, "recorded_s": step.total_s, "least_s": step.deferred_s(n / num_topk)}
        for skew, step in recorded_steps(record).items()
        for n in range(1, num_topk)
    ]


def table(qualities: list[Quality]) -> str:
    """Means over texts: of perplexity, of its growth by text, and of the rest."""
    lines = [
        "| model | lightest experts | perplexity | growth | same greedy token | KL |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, Way], list[Quality]] = {}
    for quality in qualities:
        groups.setdefault((quality.model, quality.way), []).append(quality)
    for (model, way), ones in groups.items():
        exact = {q.text: q for q in qualities if q.model == model and q.way.num_experts == 0}
        growth = [q.perplexity / exact[q.text].perplexity - 1 for q in ones]
        perplexity, same, kl = (
            sum(values) / len(ones)
            for values in ([q.perplexity for q in ones], [q.same_greedy for q in ones], [q.kl for q in ones])
        )
        mean_growth = sum(growth) / len(growth)
        lines.append(f"| {model} | {way} | {perplexity:.3f} | {mean_growth:+.2%} | {same:.1%} | {kl:.4f} |")
    return "\n".join(lines)


def earlier(out: Path, configuration: dict[str, Any]) -> list[Quality]:
    """What the same command at the same commit has written already."""
    if not out.exists():
        return []
    record = json.loads(out.read_text())
    if (record["configuration"], record["commit"]) != (configuration, artefact.commit()):
        return []
    kept = [{k: v for k, v in q.items() if k != "perplexity"} for q in record["results"]["quality"]]
    return [Quality(**q | {"way": Way(**q["way"])}) for q in kept]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path, default=[MODEL])
    parser.add_argument("--texts", nargs="+", type=Path, default=[TEXT])
    parser.add_argument("--out", type=Path, default=artefact.RESULTS / "deferral-quality.json")
    args = parser.parse_args()
    configuration = {
        "models": [folder.name for folder in args.models],
        "texts": [text.name for text in args.texts],
        "num_windows": NUM_WINDOWS,
        "num_tokens": NUM_TOKENS,
        "num_prompt": NUM_PROMPT,
        "dtype": "float32",
        "gains_from": DECODE_RUN.name,
    }
    qualities = earlier(args.out, configuration)
    bound = gains(json.loads(DECODE_RUN.read_text()))
    for folder in args.models:
        texts = [t for t in args.texts if (folder.name, t.name) not in {(q.model, q.text) for q in qualities}]
        if not texts:
            continue
        tokenizer = AutoTokenizer.from_pretrained(folder)
        num_topk = topk_of(AutoConfig.from_pretrained(folder))
        assert num_topk is not None
        ways = [Way("deferred", 0)]
        ways += [Way(name, n) for n in range(1, num_topk) for name in ("deferred", "left out")]
        models = {way: load(folder, way) for way in ways}
        for text in texts:
            ids_WT = windows(tokenizer(text.read_text(), verbose=False).input_ids)
            qualities += judge(models, folder.name, text.name, ids_WT)
            quality = [asdict(q) | {"perplexity": q.perplexity} for q in qualities]
            artefact.write("deferral", configuration, {"quality": quality, "gain": bound}, args.out)
    print(table(qualities))
    for gain in bound:
        print(
            f"{gain['skew']}, {gain['num_experts']} deferred: at most {gain['recorded_s'] / gain['least_s']:.2f}x"
        )


if __name__ == "__main__":
    main()
