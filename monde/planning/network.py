"""Which exchange between ranks moves the rows of a mixture-of-experts layer soonest, and why.

Every rank of a node holds the same tokens, as tensor parallelism leaves them; M nodes, N ranks of a node, W = M N.
A layer dispatches rows to experts and combines their outputs; all ranks of a node end with the same rows again.
Where nothing else is said, rows are spread evenly over experts and experts over ranks.

| strategy | experts | dispatch | combine |
|---|---|---|---|
| redundant | on a node, cut along F over its ranks | every rank all rows over nodes | sum in the node, then the same |
| drop + gather | the same | 1/N of the rows over nodes, then gather in the node | sum leaves 1/N, and the same |
| pipelined n | the same | drop + gather in n chunks; gathers run beside the next exchange | the same |
| EP | whole, on one rank | 1/N of the tokens, every rank with every other | back, then gather in the node |
| EP, hierarchical | whole, on one rank | 1/N of the tokens, within the node, then over nodes | back, then gather |
| sharding | cut along F over all ranks | every token to every rank | sum over all ranks, gather in the node |

Drop + gather and pipelined may send a token once to each node that has any of its experts, instead of once for each.
A backward pass moves as much: that of a dispatch is a combine and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from monde.planning.exchange import CHUNKS, Strategy, copy_s, exchange_s, gather_s, seconds
from monde.planning.network_profile import NetworkProfile


class Experts(StrEnum):
    """Where a layer's experts lie, which decides the strategies open to it."""

    CUT_IN_NODE = "cut along F over the ranks of a node"
    WHOLE = "whole, each on one rank"
    CUT_EVERYWHERE = "cut along F over all ranks"


STRATEGIES_OF: dict[Experts, tuple[Strategy, ...]] = {
    Experts.CUT_IN_NODE: (Strategy.REDUNDANT, Strategy.DROP_GATHER, Strategy.PIPELINED),
    Experts.WHOLE: (Strategy.EP, Strategy.EP_HIERARCHICAL),
    Experts.CUT_EVERYWHERE: (Strategy.SHARDING,),
}


@dataclass(frozen=True)
class Traffic:
    """One layer of one micro-batch. tokens: of one node, the same on all its ranks; row_bytes: of one hidden row.

    expert_s: computing all its experts, were they spread evenly over all ranks. node_skew, rank_skew >= 1: rows of
    the busiest node, or rank when experts are whole, over the mean.
    """

    tokens: int
    top_k: int
    num_experts: int
    row_bytes: int
    expert_s: float = 0.0
    node_skew: float = 1.0
    rank_skew: float = 1.0

    def __post_init__(self) -> None:
        if (
            min(self.tokens, self.top_k, self.row_bytes) < 1
            or self.expert_s < 0
            or self.top_k > self.num_experts
        ):
            raise ValueError(f"Traffic: expected tokens, bytes and K of E experts above 0, got {self}")
        if min(self.node_skew, self.rank_skew) < 1:
            raise ValueError(f"Traffic: skew is the greatest over the mean, at least 1, got {self}")

    @property
    def token_bytes(self) -> float:
        """Each token once."""
        return float(self.tokens * self.row_bytes)

    @property
    def routed_bytes(self) -> float:
        """A copy for each of its experts."""
        return self.token_bytes * self.top_k

    def node_bytes(self, num_nodes: int) -> float:
        """A copy for each node that has at least one of its K experts: distinct ones, all sets equally likely."""
        here = self.num_experts / num_nodes
        missed = prod(max(1 - here / (self.num_experts - i), 0.0) for i in range(self.top_k))
        return self.token_bytes * min(num_nodes * (1 - missed), self.top_k)


@dataclass(frozen=True)
class Candidate:
    """A strategy's seconds. chunks is 1 unless pipelined; inter_bytes leave one node in dispatch and combine.

    once_per_node: a token goes to a node once however many of its experts are there, and their sum comes back.
    """

    strategy: Strategy
    chunks: int
    once_per_node: bool
    dispatch_s: float
    combine_s: float
    expert_s: float
    inter_bytes: float

    @property
    def layer_s(self) -> float:
        return self.dispatch_s + self.expert_s + self.combine_s

    @property
    def exchange_s(self) -> float:
        return self.dispatch_s + self.combine_s

    @property
    def name(self) -> str:
        chunks = f", {self.chunks} chunks" if self.chunks > 1 else ""
        return f"{self.strategy}{chunks}{', once a node' if self.once_per_node else ''}"


@dataclass(frozen=True)
class Choice:
    """Candidates, the soonest first; equal ones in the order of Strategy, fewer chunks first."""

    candidates: tuple[Candidate, ...]
    why: str

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


def choose(network: NetworkProfile, traffic: Traffic, experts: Iterable[Experts] = tuple(Experts)) -> Choice:
    """argmin of dispatch_s + expert_s + combine_s over the strategies open to `experts`.

    Whole experts need at least one for every rank, experts cut in a node at least one for every node.
    """
    fewest = {
        Experts.WHOLE: network.num_ranks,
        Experts.CUT_IN_NODE: network.num_nodes,
        Experts.CUT_EVERYWHERE: 1,
    }
    open_to = [where for where in experts if traffic.num_experts >= fewest[where]]
    names = [strategy for where in open_to for strategy in STRATEGIES_OF[where]]
    found = [
        candidate(network, traffic, strategy, chunks, once)
        for strategy in names
        for chunks in (CHUNKS if strategy is Strategy.PIPELINED else (1,))
        for once in ((False, True) if strategy in (Strategy.DROP_GATHER, Strategy.PIPELINED) else (False,))
    ]
    if not found:
        raise ValueError(
            f"choose: {traffic.num_experts} experts are too few for {network.num_nodes} nodes of "
            f"{network.ranks_per_node} ranks; cut them over all ranks (Experts.CUT_EVERYWHERE)"
        )
    ordered = tuple(sorted(found, key=lambda c: c.layer_s))
    return Choice(ordered, _why(network, ordered))


def candidate(
    network: NetworkProfile,
    traffic: Traffic,
    strategy: Strategy,
    chunks: int = 1,
    once_per_node: bool = False,
) -> Candidate:
    """The seconds of one strategy; chunks matter to Strategy.PIPELINED alone."""
    if chunks < 1 or (chunks > 1) != (strategy is Strategy.PIPELINED):
        raise ValueError(f"candidate: {strategy} takes {'2 or more chunks' if chunks == 1 else 'one chunk'}")
    away = (network.num_nodes - 1) / network.num_nodes
    routed = traffic.routed_bytes
    if strategy is Strategy.SHARDING:
        over_nodes = (network.num_nodes - 1) * traffic.token_bytes
        return Candidate(strategy, 1, False, *_sharding_s(network, traffic), traffic.expert_s, 2 * over_nodes)
    if strategy in STRATEGIES_OF[Experts.WHOLE]:
        once_s = _between_ranks_s(network, routed / network.ranks_per_node * traffic.rank_skew, strategy)
        back_s = once_s + gather_s(network, traffic.token_bytes)
        return Candidate(
            strategy, 1, False, once_s, back_s, traffic.expert_s * traffic.rank_skew, 2 * routed * away
        )
    copies = network.ranks_per_node if strategy is Strategy.REDUNDANT else 1
    sent = traffic.node_bytes(network.num_nodes) if once_per_node else routed
    rows = sent * traffic.node_skew
    return Candidate(
        strategy,
        chunks,
        once_per_node,
        exchange_s(network, rows, rows * away, False, strategy, chunks),
        exchange_s(network, rows, rows * away, True, strategy, chunks),
        traffic.expert_s * traffic.node_skew,
        2 * copies * sent * away,
    )


def _between_ranks_s(network: NetworkProfile, rows_bytes: float, strategy: Strategy) -> float:
    """The rows of one rank to all ranks, at once or first within the node, sorted before and after."""
    M, N, W = network.num_nodes, network.ranks_per_node, network.num_ranks
    sort_s = 2 * copy_s(network, rows_bytes)
    if strategy is Strategy.EP:
        return sort_s + seconds(network.world_a2a, rows_bytes * (W - 1) / W)
    within_s = seconds(network.local_a2a, rows_bytes * (N - 1) / N) + copy_s(network, rows_bytes)
    return sort_s + within_s + seconds(network.node_a2a, rows_bytes * (M - 1) / M)


def _sharding_s(network: NetworkProfile, traffic: Traffic) -> tuple[float, float]:
    """Dispatch and combine. 1/N of a node's tokens from each rank to the other nodes, gathered there; sums mirror it."""
    M, N, one_node = network.num_nodes, network.ranks_per_node, traffic.token_bytes
    all_nodes = M * one_node
    over_nodes_s = seconds(network.node_a2a, (M - 1) * one_node / N)
    gathered_s = gather_s(network, all_nodes - one_node) + copy_s(network, all_nodes)
    summed_s = seconds(network.local_a2a, all_nodes * (N - 1) / N) + copy_s(network, all_nodes)
    return over_nodes_s + gathered_s, summed_s + over_nodes_s + gather_s(network, one_node)


def _why(network: NetworkProfile, ordered: tuple[Candidate, ...]) -> str:
    best = ordered[0]
    text = f"{best.name}: {best.layer_s * 1e3:.3g} ms a layer"
    plain = next((c for c in ordered if c.strategy is Strategy.REDUNDANT), None)
    if plain is not None and plain is not best:
        text += (
            f", {plain.layer_s / best.layer_s:.2f}x as fast as redundant; "
            f"{best.inter_bytes / 2**20:.3g} MiB leave a node instead of {plain.inter_bytes / 2**20:.3g}"
        )
    elif plain is not None and len(ordered) > 1:
        text += f"; {ordered[1].name} would take {ordered[1].layer_s / best.layer_s:.2f}x as long"
    if network.nic_contention > 1.05:
        text += f". The {network.ranks_per_node} ranks of a node slow each other {network.nic_contention:.2f}x on its link"
    slow = network.overlap
    if best.chunks > 1 and max(slow.first, slow.second) > 1.05:
        text += f". While both run, exchanges over nodes take {slow.first:.2f}x and gathers {slow.second:.2f}x as long"
    return text + "."
