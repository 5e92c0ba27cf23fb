"""Clusters nobody here has: an exchange under 8-card tensor parallelism, and 2x70B on 16 A800, from stated assumptions.

python -m bench.network_simulated [--out FILE]

End to end: two nodes of 8, tensor parallelism over a node, one of the two experts on each node, a sequence of 8192
tokens per node, bf16, every layer a mixture (80 layers, D = 8192, F = 28672, 64 heads, 8 of keys and values: the
shapes of a dense 70B model). Assumed: GEMMs and attention at `--mfu` of 312 TFLOP/s, backward twice the forward
computation and as much exchange, tensor-parallel sums at the NVLink's rate, no exchange hidden behind computation, no
recomputation, gradients of what both nodes share hidden behind backward. Links: monde.planning.network_profile.CLUSTERS.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import artefact
from monde.planning.exchange import Strategy, dispatch_s, exchanges
from monde.planning.network import Experts, Traffic, candidate, choose
from monde.planning.network_profile import CLUSTERS, NetworkProfile

PEAK_FLOPS = 312e12


@dataclass(frozen=True)
class Shape:
    num_layers: int = 80
    d_model: int = 8192
    d_ffn: int = 28672
    num_kv_heads: int = 8
    head_dim: int = 128
    num_experts: int = 2
    tokens: int = 8192

    def forward_flops(self, top_k: int) -> float:
        """Of one layer on one node; causal attention counts half."""
        T, D = self.tokens, self.d_model
        projections = 2 * T * D * (2 * D + 2 * self.num_kv_heads * self.head_dim)
        return projections + 2 * T * T * D + 6 * T * top_k * D * self.d_ffn


def exchange(network: NetworkProfile, size_bytes: float) -> dict[str, Any]:
    """A dispatch, onto all ranks of the node: the soonest way over the redundant one, also with a token once a node."""
    redundant_s = dispatch_s(network, size_bytes, Strategy.REDUNDANT, 1)

    def best(away_bytes: float) -> dict[str, Any]:
        way = exchanges(network, 2 * away_bytes, away_bytes, adds=False)[0]
        return {**asdict(way), "speedup": redundant_s / way.seconds_s}

    def once_a_node(top_k: int, num_experts: int) -> dict[str, Any]:
        traffic = Traffic(tokens=8192, top_k=top_k, num_experts=num_experts, row_bytes=8192)
        return best(size_bytes * traffic.node_bytes(network.num_nodes) / traffic.routed_bytes)

    return {
        "away_bytes_of_a_rank": size_bytes,
        "redundant_s": redundant_s,
        "best": best(size_bytes),
        "once a node, top-2 of 8": once_a_node(2, 8),
        "once a node, top-8 of 64": once_a_node(8, 64),
    }


def end_to_end(network: NetworkProfile, top_k: int, mfu: float) -> dict[str, Any]:
    """Seconds of a training step with the redundant exchange and with the chosen one."""
    shape = Shape()
    traffic = Traffic(shape.tokens, top_k, shape.num_experts, 2 * shape.d_model)
    compute_s = shape.forward_flops(top_k) / (network.ranks_per_node * PEAK_FLOPS * mfu)
    N, activations = network.ranks_per_node, traffic.token_bytes
    # Attention's sum in the node: an exchange and a gather of the same bytes.
    sum_s = 2 * float(network.local_gather.seconds(activations * (N - 1) / N))
    plain = candidate(network, traffic, Strategy.REDUNDANT)
    chosen = choose(network, traffic, [Experts.CUT_IN_NODE]).best

    def step_s(exchange_s: float) -> float:
        return shape.num_layers * (3 * compute_s + 2 * sum_s + 2 * exchange_s)

    return {
        "top_k": top_k,
        "mfu": mfu,
        "forward_compute_s": compute_s,
        "chosen": chosen.name,
        "exchange_s": {"redundant": plain.exchange_s, "chosen": chosen.exchange_s},
        "step_s": {"redundant": step_s(plain.exchange_s), "chosen": step_s(chosen.exchange_s)},
        "speedup": step_s(plain.exchange_s) / step_s(chosen.exchange_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mfu", type=float, nargs="+", default=[0.4, 0.5, 0.6])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"exchange": {}, "end_to_end": {}, "links": {}}
    for name in ("a800-1nic", "a800-4nic", "a800-8nic"):
        network = CLUSTERS[name].profile()
        results["links"][name] = asdict(network)
        results["exchange"][name] = [exchange(network, mib * 2.0**20) for mib in (1, 4, 16, 64, 256)]
        results["end_to_end"][name] = [end_to_end(network, k, mfu) for k in (1, 2) for mfu in args.mfu]
        for e in results["exchange"][name]:
            told = ", ".join(f"{k} {v['speedup']:.2f}x" for k, v in e.items() if isinstance(v, dict))
            print(f"{name} {e['away_bytes_of_a_rank'] / 2**20:.0f} MiB: {told}")
        for e in results["end_to_end"][name]:
            print(
                name,
                f"2x70B top-{e['top_k']}, MFU {e['mfu']}: {100 * (e['speedup'] - 1):.0f}% sooner by {e['chosen']}",
            )
    print(
        artefact.write(
            "network_simulated", {"shape": asdict(Shape()), "assumptions": __doc__}, results, args.out
        )
    )


if __name__ == "__main__":
    main()
