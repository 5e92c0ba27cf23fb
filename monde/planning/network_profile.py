"""How fast the ranks of a mesh exchange rows: measured over that mesh, or derived from the links of a described cluster.

M nodes, N ranks of a node, W = M N ranks in all.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from monde.planning.fit import AlphaBeta
from monde.planning.profile import Overlap

NETWORK_VERSION = 1
_LINES = ("node_a2a", "node_a2a_alone", "local_gather", "local_a2a", "world_a2a", "copy")
NO_CONFLICT = Overlap()


@dataclass(frozen=True)
class WayTimes:
    """What one way took, measured at a few sizes: seconds over the bytes that all go to other nodes."""

    strategy: str
    chunks: int
    adds: bool
    away_bytes: tuple[float, ...]
    seconds_s: tuple[float, ...]


@dataclass(frozen=True)
class NetworkProfile:
    """Collectives of one mesh. All AlphaBeta are over the bytes that one rank sends to others, all ranks at once.

    node_a2a: each rank with its counterparts on the other nodes; node_a2a_alone: the same while only one rank of a
    node sends. local_gather, local_a2a: within a node. world_a2a: every rank with every other. copy: permuting rows,
    over bytes written. overlap slows (node_a2a, local_gather) while the other runs. chunk_s: what a chunk of a pipeline
    costs between two of its collectives, when threads or kernels wake. ways: whole exchanges, by which the sums of
    their collectives are corrected. source: what was measured and what is assumed.
    """

    num_nodes: int
    ranks_per_node: int
    node_a2a: AlphaBeta
    node_a2a_alone: AlphaBeta
    local_gather: AlphaBeta
    local_a2a: AlphaBeta
    world_a2a: AlphaBeta
    copy: AlphaBeta
    overlap: Overlap
    chunk_s: float
    source: str
    ways: tuple[WayTimes, ...] = ()

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.ranks_per_node < 1:
            raise ValueError(
                f"NetworkProfile: expected at least one node and rank, got {self.num_nodes}x{self.ranks_per_node}"
            )

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def nic_contention(self) -> float:
        """How many times longer a byte takes to leave the node when all its ranks send: 1 where each has a NIC."""
        alone = self.node_a2a_alone.s_per_unit
        return max(self.node_a2a.s_per_unit / alone, 1.0) if alone > 0 else 1.0

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({"version": NETWORK_VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> NetworkProfile:
        """Errors: ValueError when the file is no profile of a network, or of another version."""
        remedy = "measure it again with monde.calibration.network"
        try:
            data = json.loads(Path(path).read_text())
            version = data.pop("version")
            if version != NETWORK_VERSION:
                raise ValueError(
                    f"{path}: network profile version {version}, expected {NETWORK_VERSION}; {remedy}"
                )
            data |= {name: AlphaBeta(**data[name]) for name in _LINES}
            data["overlap"] = Overlap(**data["overlap"])
            data["ways"] = tuple(_way_times(way) for way in data["ways"])
            return cls(**data)
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: not a profile of a network ({error}); {remedy}") from error


def _way_times(data: dict[str, Any]) -> WayTimes:
    sizes, seconds = (tuple(map(float, data[name])) for name in ("away_bytes", "seconds_s"))
    return WayTimes(data["strategy"], data["chunks"], data["adds"], sizes, seconds)


@dataclass(frozen=True)
class Cluster:
    """Nodes and links as data sheets state them.

    nic: one message through one NIC; intra: one message between two ranks of a node, whose switch serves all ranks at
    once; copy: rows permuted in a rank's memory; all over bytes. A rank uses one NIC; ranks share NICs evenly.
    conflict: what both networks share in a node, such as PCIe switches, slows (inter, intra).
    """

    num_nodes: int
    ranks_per_node: int
    nic: AlphaBeta
    nics_per_node: int
    intra: AlphaBeta
    copy: AlphaBeta
    source: str
    conflict: Overlap = NO_CONFLICT

    def __post_init__(self) -> None:
        if min(self.num_nodes, self.ranks_per_node, self.nics_per_node) < 1:
            raise ValueError(f"Cluster: expected at least one node, rank of a node and NIC, got {self}")

    @property
    def ranks_per_nic(self) -> int:
        return -(-self.ranks_per_node // self.nics_per_node)

    def profile(self) -> NetworkProfile:
        """Each peer costs a latency; bytes share what they pass through. Exchanges over both links take the longer."""
        M, N = self.num_nodes, self.ranks_per_node
        others_local, others_away, others = N - 1, (M - 1) * N, max(M * N - 1, 1)
        shared_s = self.nic.s_per_unit * self.ranks_per_nic
        local = AlphaBeta(self.intra.alpha_s * others_local, self.intra.s_per_unit)
        return NetworkProfile(
            num_nodes=M,
            ranks_per_node=N,
            node_a2a=AlphaBeta(self.nic.alpha_s * (M - 1), shared_s),
            node_a2a_alone=AlphaBeta(self.nic.alpha_s * (M - 1), self.nic.s_per_unit),
            local_gather=local,
            local_a2a=local,
            world_a2a=AlphaBeta(
                self.nic.alpha_s * others_away + local.alpha_s,
                max(shared_s * others_away / others, self.intra.s_per_unit * others_local / others),
            ),
            copy=self.copy,
            overlap=self.conflict,
            chunk_s=self.copy.alpha_s,
            source=self.source,
        )

    def with_mesh(self, num_nodes: int, ranks_per_node: int) -> Cluster:
        """The same links under another number of nodes and ranks; a node keeps its NICs."""
        return replace(self, num_nodes=num_nodes, ranks_per_node=ranks_per_node)


def _gbytes(gbytes_per_s: float, alpha_s: float) -> AlphaBeta:
    return AlphaBeta(alpha_s, 1e-9 / gbytes_per_s)


# Latencies of 10 us across nodes and 5 us within are NCCL's usual small-message times per peer; links count at 80%
# of their nominal rate, memory at 80% read and written once each.
CLUSTERS: dict[str, Cluster] = {
    "a800-1nic": Cluster(
        2, 8, _gbytes(20, 10e-6), 1, _gbytes(160, 5e-6), _gbytes(800, 3e-6),
        "data sheets at 80%: A800, NVLink 200 GB/s each way, one 200 Gb/s NIC a node; latencies assumed",
    ),
    "a800-4nic": Cluster(
        2, 8, _gbytes(20, 10e-6), 4, _gbytes(160, 5e-6), _gbytes(800, 3e-6),
        "data sheets at 80%: A800, NVLink 200 GB/s each way, four 200 Gb/s NICs a node; latencies assumed",
    ),
    "a800-8nic": Cluster(
        2, 8, _gbytes(20, 10e-6), 8, _gbytes(160, 5e-6), _gbytes(800, 3e-6),
        "data sheets at 80%: A800, NVLink 200 GB/s each way, a 200 Gb/s NIC for every GPU; latencies assumed",
    ),
    "h100-8nic": Cluster(
        2, 8, _gbytes(40, 10e-6), 8, _gbytes(360, 5e-6), _gbytes(1340, 3e-6),
        "data sheets at 80%: H100, NVLink 450 GB/s each way, a 400 Gb/s NIC for every GPU; latencies assumed",
    ),
    "10gbe": Cluster(
        2, 4, _gbytes(1.0, 30e-6), 1, _gbytes(8, 15e-6), _gbytes(8, 5e-6),
        "assumed: 10 Gb/s Ethernet at 80%, one NIC a node, 8 GB/s between processes of a node",
    ),
}  # fmt: skip
