"""Other projects' host kernels, made into a step of the whole model by arithmetic, and stated as such.

step = step without experts, in one graph (measured)
       + layers with cold experts * (kernel of the peer, for the share of experts that is cold + its handshake)
       + layers without: their experts at the GPU's bandwidth

The kernel is measured with every expert cold (bench/peers.py). Experts are popular-static, as KTransformers places
them; those on the GPU cost nothing more than their bytes, and none beside cold ones, which flatters the peer.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.decode.bound import Traffic
from bench.peers import Peer

# GPU -> CPU -> GPU of one layer's activations at batch 1 in a graph of 48 layers, measured on an H200's host: two
# cudaLaunchHostFunc (kt-kernel; llama.cpp synchronises the stream, which takes no less), stream memory operations.
HANDSHAKES_S = {"kt-kernel": 57e-6, "freetoken": 22e-6}
_OTHER_HANDSHAKE_S = 57e-6


@dataclass(frozen=True)
class PeerKernel:
    """layer_s[batch]: seconds of one layer with all experts cold."""

    name: str
    layer_s: dict[int, float]

    @property
    def handshake_s(self) -> float:
        return HANDSHAKES_S.get(self.name, _OTHER_HANDSHAKE_S)

    def step_s(
        self, batch: int, traffic: Traffic, floor_s: float, num_layers: int, resident_s: float
    ) -> float:
        """traffic: of the popular-static placement, over all layers. resident_s: of one expert on the GPU."""
        cold_share = traffic.cold_experts / (traffic.cold_experts + traffic.resident_experts)
        kernels_s = num_layers * cold_share * self.layer_s[batch]
        alone_s = traffic.residents_alone * resident_s
        return floor_s + kernels_s + alone_s + traffic.layers_with_cold * self.handshake_s


def measured(peer: Peer, batches: list[int], num_threads: int, seconds_s: float) -> PeerKernel:
    """Errors: RuntimeError with the peer's own words when it fails."""
    return PeerKernel(peer.name, {batch: peer.measure(batch, num_threads)(seconds_s)[0] for batch in batches})
