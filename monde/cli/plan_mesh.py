"""`monde plan --mesh`: what the exchanges of a mixture-of-experts layer take between nodes, by every strategy."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monde.planning.network import Candidate, Choice, Traffic
    from monde.planning.network_profile import NetworkProfile


def parse_mesh(mesh: str) -> tuple[int, int]:
    """ "2x8": two nodes of eight ranks. Errors: ValueError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", mesh)
    if match is None:
        raise ValueError(f"--mesh: expected nodes x ranks of a node, as 2x8, got {mesh!r}")
    return int(match.group(1)), int(match.group(2))


def find_network(network: str | None, num_nodes: int, ranks_per_node: int) -> NetworkProfile:
    """Of a described cluster with that mesh, or of a measured file, which must be of that mesh."""
    from monde.planning.network_profile import CLUSTERS, NetworkProfile

    known = ", ".join(CLUSTERS)
    if network is None:
        raise ValueError(f"--mesh: which network? Give --network with a measured file or one of {known}")
    if network in CLUSTERS:
        return CLUSTERS[network].with_mesh(num_nodes, ranks_per_node).profile()
    if not Path(network).is_file():
        raise ValueError(
            f"--network: {network!r} is neither a file nor one of the described clusters {known}"
        )
    profile = NetworkProfile.load(network)
    if (profile.num_nodes, profile.ranks_per_node) != (num_nodes, ranks_per_node):
        raise ValueError(
            f"--network: {network} was measured on {profile.num_nodes}x{profile.ranks_per_node} ranks; give that "
            "mesh, or measure this one"
        )
    return profile


def traffic_of(model: str, tokens: int) -> Traffic:
    """Of the model's first mixture layer."""
    from monde.models.outline import outline_of
    from monde.planning.network import Traffic

    outline = outline_of(model, tokens, 1, on_gpu=False).outline
    layer = outline.layers[0]
    row_bytes = layer.shape.d_model * outline.dense_bytes_per_weight
    return Traffic(tokens, layer.num_topk, len(layer.popularity_E), row_bytes)


def mesh_answer(choice: Choice, network: NetworkProfile, traffic: Traffic) -> dict[str, Any]:
    return {
        "mesh": [network.num_nodes, network.ranks_per_node],
        "source": network.source,
        "traffic": asdict(traffic),
        "chosen": choice.best.name,
        "why": choice.why,
        "candidates": [{"name": c.name, "layer_s": c.layer_s, **asdict(c)} for c in choice.candidates],
    }


def mesh_text(choice: Choice, network: NetworkProfile, traffic: Traffic, name: str) -> str:
    """A line for every candidate, the soonest first."""
    from monde.planning.network import STRATEGIES_OF
    from monde.sizes import format_bytes

    where = {strategy: experts for experts, strategies in STRATEGIES_OF.items() for strategy in strategies}
    rows: list[tuple[str, ...]] = [
        ("strategy", "experts", "dispatch ms", "combine ms", "sum ms", "leaves a node")
    ]

    def row(c: Candidate) -> tuple[str, ...]:
        milliseconds = (f"{1e3 * s:.3f}" for s in (c.dispatch_s, c.combine_s, c.exchange_s))
        return c.name, str(where[c.strategy]), *milliseconds, format_bytes(int(c.inter_bytes))

    rows += [row(c) for c in choice.candidates]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    table = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    ]
    return "\n".join(
        [
            f"network of {name}, {network.num_nodes} nodes of {network.ranks_per_node} ranks: {network.source}",
            f"one layer: {traffic.tokens} tokens a node, the same on all its ranks, top-{traffic.top_k} of "
            f"{traffic.num_experts} experts, rows of {format_bytes(traffic.row_bytes)}, spread evenly",
            "",
            *table,
            "",
            f"chosen: {choice.why}",
            "Backward exchanges take as long as forward ones. Computation is not counted.",
        ]
    )
