"""One MoE layer of Switch-Base's dimensions on Gloo ranks of this machine: contenders in turns, answers checked first.

fp32, top-1, ReLU, one thread a rank. Ranks are pinned to cores in turn, so more ranks than cores share them.
    dropless    whole experts on ranks, uneven exchanges (monde.executors.peers)
    control     the same once more: what it differs by is noise
    sharded     a slice of every expert on each rank, in one chunk as in the paper (monde.executors.sharded)
    chosen      what monde.planning.sharding takes for the batch, from costs measured on these ranks; the plan included
    deepspeed   padded capacities as the paper configures them, reimplemented (bench/padded_ep.py)
A sample is the slowest rank's time; ratios are of samples of one round. W ranks, T tokens a rank, E experts, D model dim, F expert hidden dim.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bench.moeshard import D_FFN, D_MODEL, NO_SKEW, PAPER, PUBLISHED_CODE, num_hot
from bench.sharded_layer import DEADLINE_S, MAX_PADDED_ROWS, TOLERANCE, RankedLayer
from tests.distributed.ranks import run_ranks

ROUTERS = (NO_SKEW, PAPER, PUBLISHED_CODE)


def configuration() -> dict[str, Any]:
    return {
        "d_model": D_MODEL,
        "d_ffn": D_FFN,
        "dtype": "float32",
        "top_k": 1,
        "threads_of_a_rank": 1,
        "routers": [asdict(router) for router in ROUTERS],
        "max_padded_rows": MAX_PADDED_ROWS,
        "tolerance": TOLERANCE,
    }


def measure(num_ranks: int, experts: list[int], tokens: list[int]) -> list[dict[str, Any]]:
    """All cases of these numbers of experts, each on ranks of its own."""
    cases = []
    for num_experts in experts:
        with tempfile.TemporaryDirectory() as folder:
            found = run_ranks(_cases, num_ranks, Path(folder), num_experts, tokens, deadline_s=DEADLINE_S)
        cases += found[0]
        print(*map(line, found[0]), sep="\n", flush=True)
    return cases


def _cases(num_experts: int, tokens: list[int]) -> list[dict[str, Any]]:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[dist.get_rank() % len(os.sched_getaffinity(0))]})
    layer = RankedLayer(num_experts)
    # Of one hot expert alpha is shared and its own.
    routers = ROUTERS if num_hot(num_experts) > 1 else ROUTERS[:2]
    return [layer.case(num_tokens, router) for num_tokens in tokens for router in routers]


def line(case: dict[str, Any]) -> str:
    plan = case["plan"]
    times = ", ".join(f"{name} {1e3 * seconds_s:.1f}" for name, seconds_s in case["median_s"].items())
    return (
        f"W={case['num_ranks']} E={case['num_experts']} T={case['num_tokens']} {case['router']}: ms {times}; "
        f"{plan['way']} in {plan['num_chunks']}, predicted sharded {1e3 * plan['sharded_s']:.1f}, "
        f"dropless {1e3 * plan['peers_s']:.1f}; of dropless {', '.join(map(_ratio, case['of_dropless'].items()))}"
    )


def _ratio(named: tuple[str, dict[str, float]]) -> str:
    name, ratio = named
    return f"{name} {ratio['median']:.3f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown of docs/sharding-evaluation.md, and where the choice is over 5% slower than dropless peers.

    By router: dropless / sharded / chosen in ms, and chosen over dropless, the median over rounds. Slower beyond noise:
    the median's whole interval lies above 1.05.
    """
    names = [router.name for router in ROUTERS]
    lines = [
        "| ranks | E | tokens a rank | padded | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    rows = {(case["num_ranks"], case["num_experts"], case["num_tokens"]): [] for case in cases}
    for case in cases:
        rows[case["num_ranks"], case["num_experts"], case["num_tokens"]].append(case)
    for (num_ranks, num_experts, num_tokens), mine in sorted(rows.items()):
        cells = dict.fromkeys(names, "")
        for case in mine:
            ms = [f"{1e3 * case['median_s'][name]:.1f}" for name in ("dropless", "sharded", "chosen")]
            cells[case["router"]] = f"{' / '.join(ms)}, {case['of_dropless']['chosen']['median']:.2f}"
        padded = [case["median_s"]["deepspeed"] for case in mine if "deepspeed" in case["median_s"]]
        told = f"{1e3 * statistics.median(padded):.0f}" if padded else ""
        lines.append(
            f"| {num_ranks} | {num_experts} | {num_tokens} | {told} | " + " | ".join(cells.values()) + " |"
        )
    slow = {
        name: [case for case in cases if case["of_dropless"][name]["median"] > 1.05]
        for name in ("chosen", "control")
    }
    surely = [case for case in slow["chosen"] if case["of_dropless"]["chosen"]["low"] > 1.05]
    imbalances = [case["imbalance"]["sharded"] for case in cases]
    dropped = sum(sum(case["dropped"].values()) for case in cases)
    over = [
        c["median_s"]["deepspeed"] / c["median_s"]["chosen"] for c in cases if "deepspeed" in c["median_s"]
    ]
    lines += [
        "",
        f"{len(cases)} cases, imbalance of sharded at most {max(imbalances):.3f}, {dropped} tokens dropped by anybody, "
        f"padded buffers {min(over):.1f} to {max(over):.1f} times chosen; over 5% slower than dropless: chosen "
        f"{len(slow['chosen'])} ({len(surely)} beyond noise), dropless itself once more {len(slow['control'])}:",
        *map(line, slow["chosen"]),
    ]
    return "\n".join(lines)
