"""How the experts of one model are cut over the ranks of a mesh: which parts this rank holds, and who computes what.

L layers, W ranks, E experts of a layer, F expert hidden dim, P parts of a layer that a rank holds: a slice of every
expert, or some experts whole, or both.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hostcompute import ExpertSpec
from monde.config import MondeConfig
from monde.executors.peers import PeersExecutor
from monde.executors.rank_probe import measure_ranks
from monde.executors.ranked import RankedExecutor
from monde.executors.ranked_batch import header_words
from monde.executors.ranks import RankGroup
from monde.executors.sharded import Compute, ShardedExecutor
from monde.planning.sharding import (
    BatchPlan,
    RankedCost,
    RankedCounts,
    Way,
    WayFactors,
    assign_experts,
    cut_ffn,
    plan_batch,
)
from monde.weights.packing import TORCH_DTYPES
from monde.weights.parts import FfnSlice, Part, SomeExperts

_SAMPLED_VALUES = 64
_WAYS = {"sharded": (Way.SHARDED,), "peers": (Way.PEERS,), "auto": (Way.SHARDED, Way.PEERS)}


@dataclass(frozen=True)
class Held:
    """A part of a layer; part_idx counts the parts of all layers, layer by layer."""

    part_idx: int
    way: Way
    part: Part


class RankedModel:
    """specs: of the whole experts of every layer. All ranks make one together.

    Errors: ValueError on all ranks where they were given different models or settings, or too small an F.
    """

    def __init__(self, ranks: RankGroup, config: MondeConfig, specs: Sequence[ExpertSpec]) -> None:
        self.ranks, self.whole, self.ways = ranks, list(specs), _WAYS[config.parallel]
        share_W = config.mesh_shares or (1.0,) * ranks.size
        ranks.agree_same(
            {
                "number of MoE layers": len(self.whole),
                "experts": self.whole,
                "parallel": config.parallel,
                "mesh_shares": share_W,
                "mesh_timeout_s": config.mesh_timeout_s,
                "nllb_upstream_routing": config.nllb_upstream_routing,
            }
        )
        ranks.reserve_header(max((header_words(ranks.size, spec.num_experts) for spec in specs), default=0))
        self.share_W = tuple(share / sum(share_W) for share in share_W)
        self.first_expert_LW1 = [assign_experts(spec.num_experts, ranks.size) for spec in self.whole]
        self.held_LP: list[list[Held]] = []
        for layer_idx, spec in enumerate(self.whole):
            parts = [self._part(way, layer_idx, spec) for way in self.ways]
            first_idx = layer_idx * len(parts)
            self.held_LP.append(
                [
                    Held(first_idx + i, way, part)
                    for i, (way, part) in enumerate(zip(self.ways, parts, strict=True))
                ]
            )
        self._cost_of: dict[ExpertSpec, RankedCost] = {}
        self._digest = 0

    def _part(self, way: Way, layer_idx: int, spec: ExpertSpec) -> Part:
        rank = self.ranks.rank
        if way is Way.SHARDED:
            cuts_W1 = cut_ffn(spec.d_ffn, self.share_W)
            return FfnSlice(spec, cuts_W1[rank], cuts_W1[rank + 1])
        first_W1 = self.first_expert_LW1[layer_idx]
        return SomeExperts(spec, first_W1[rank], first_W1[rank + 1])

    # ---- weights ----
    @property
    def specs(self) -> list[ExpertSpec]:
        """Of the parts that this rank holds, layer by layer."""
        return [held.part.spec for held_P in self.held_LP for held in held_P]

    def parts_of(
        self, layer_idx: int, expert_id: int, arrays: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """(part_idx, the expert's id there, arrays) for every part of one expert that belongs here."""
        for held in self.held_LP[layer_idx]:
            local_id = held.part.local_id(expert_id)
            if local_id is not None:
                yield held.part_idx, local_id, held.part.take(arrays)

    def holds(self, layer_idx: int, expert_id: int) -> bool:
        return any(held.part.local_id(expert_id) is not None for held in self.held_LP[layer_idx])

    def note(self, arrays: Mapping[str, Tensor]) -> None:
        """A whole expert came by: remember a little of each of its matrices, which one page has."""
        for _, array in sorted(arrays.items()):
            line = array if array.dim() == 1 else array[0] if array.stride(1) == 1 else array[:, 0]
            sample = line[:_SAMPLED_VALUES].contiguous().view(torch.uint8)
            self._digest = zlib.crc32(sample.numpy().tobytes(), self._digest)

    def check_same_experts(self) -> None:
        """After loading: whether slices are of one model's experts. Whole experts on peers have nothing to compare.

        Errors: ValueError on all ranks if they are not.
        """
        if Way.SHARDED in self.ways:
            self.ranks.agree_same({"experts (digest)": self._digest})

    def join(self, layer_idx: int, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole expert from what each rank has of it in its first part; all ranks call it. Errors: RankError."""
        return self.held_LP[layer_idx][0].part.join(self.ranks.agree(dict(mine)))

    # ---- compute ----
    def executor(self, layer_idx: int, compute_P: Sequence[Compute]) -> RankedExecutor:
        """compute_P: of this rank's parts of the layer."""
        first_W1 = self.first_expert_LW1[layer_idx]
        compute_of = dict(zip(self.ways, compute_P, strict=True))
        sharded = peers = None
        if Way.SHARDED in compute_of:
            sharded = ShardedExecutor(self.ranks, compute_of[Way.SHARDED])
        if Way.PEERS in compute_of:
            peers = PeersExecutor(self.ranks, compute_of[Way.PEERS], first_W1[self.ranks.rank])
        spec = self.whole[layer_idx]

        def plan(counts: RankedCounts, factors: WayFactors) -> BatchPlan:
            cost = self._cost_of.get(spec)
            if cost is None:  # before anything was measured
                return BatchPlan(self.ways[0], 1, math.nan, math.nan, math.nan)
            return plan_batch(counts, cost, self.ways, factors)

        return RankedExecutor(self.ranks, layer_idx, first_W1, plan, sharded, peers)

    def measure(self, layer_idx: int, compute: Compute, device: torch.device) -> None:
        """What the first part of this layer takes here, once for all layers of its shape. All ranks call it."""
        spec, held = self.whole[layer_idx], self.held_LP[layer_idx][0]
        if spec in self._cost_of:
            return
        num_held = spec.num_experts
        if held.way is Way.PEERS:
            first_W1 = self.first_expert_LW1[layer_idx]
            num_held = first_W1[self.ranks.rank + 1] - first_W1[self.ranks.rank]
        self._cost_of[spec] = measure_ranks(
            self.ranks,
            compute,
            num_held,
            held.part.spec.d_ffn / spec.d_ffn,
            self.share_W,
            self.first_expert_LW1[layer_idx],
            spec.d_model,
            TORCH_DTYPES[spec.dtype],
            device,
        )

    @property
    def costs(self) -> tuple[RankedCost, ...]:
        """What was measured, by shape of layer."""
        return tuple(self._cost_of.values())
