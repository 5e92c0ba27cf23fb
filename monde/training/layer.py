"""A mixture-of-experts layer in training, the whole story on one screen.

    x -> gate -> order -> dispatch -> experts -> combine -> inverse order -> y

Letters: T tokens of this rank, E experts over all ranks, R rows, D model dim, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hostcompute import ExpertSpec
from monde.planning.pipeline import UNSCHEDULED, Degrees
from monde.routing.gates import Balance, Gate, Mixture, Pairs, pairs_of
from monde.training.experts import ExpertWeights
from monde.training.fabric import Fabric, fabric_of
from monde.training.hooks import NO_HOOKS, Hooks, call
from monde.training.order import order_of
from monde.training.overlap import Slices, Step, overlapped
from monde.training.traffic import Traffic

ORDERS = (None, "index", "einsum")


@dataclass(frozen=True)
class Load:
    """What one forward routed, over all ranks. assigned_E: pairs before any are dropped."""

    assigned_E: Tensor
    num_tokens: int
    busiest_rows: int


class ShardedExperts(nn.Module):
    """Experts of all ranks behind one call: every rank's tokens to every expert, exactly, none dropped.

    schedule: Degrees, or how to choose them from the rows of the busiest node (the same on all ranks).
    load: of the last forward.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        mesh: DeviceMesh | Fabric | None = None,
        *,
        schedule: Degrees | Callable[[int], Degrees] = UNSCHEDULED,
        hooks: Hooks = NO_HOOKS,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.fabric = fabric_of(mesh)
        self.fabric.must_agree("the experts' shape", spec)
        self.weights = ExpertWeights(spec, self.fabric, initialise=initialise)
        self.schedule, self.hooks = schedule, hooks
        self.slices: Callable[[], Slices] = Slices
        self.load: Load | None = None

    def run(
        self, x_TD: Tensor, choice: Pairs | Mixture, order_name: str | None, balance: Balance | None
    ) -> Tensor:
        """y_TD of tokens already routed. Errors: ValueError, before anything is sent, for x of another type than the experts."""
        dtype = self.weights.up.dtype
        if x_TD.dtype != dtype:
            raise ValueError(
                f"experts: expected x of {dtype}, as they are, got {x_TD.dtype}; convert it, or make the experts in that "
                "type"
            )
        order = order_of(choice, order_name)
        rows_RD = call(self.hooks.before_dispatch, "before_dispatch", order.rows(x_TD))
        traffic = self._exchange_counts(order.counts_E, len(x_TD), balance)
        step = Step(self.weights, traffic, self._degrees(traffic), self.hooks, self.slices)
        rows_RD = overlapped(rows_RD, step)
        return order.restore(call(self.hooks.after_combine, "after_combine", rows_RD))

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """What transformers' experts return: the weighted sum over a token's experts, in x's type."""
        pairs = pairs_of(topk_ids_TK, topk_weights_TK, self.weights.spec.num_experts)
        return self.run(x_TD, pairs, "index", None)

    def _exchange_counts(self, counts_E: Tensor, num_tokens: int, balance: Balance | None) -> Traffic:
        E = len(counts_E)
        assigned_E = counts_E if balance is None else balance.assigned_E
        own_V = torch.cat((counts_E, assigned_E, counts_E.new_tensor([num_tokens])))
        all_NLV = self.fabric.gather_counts(own_V)
        traffic = Traffic(all_NLV[..., :E], self.fabric.node_idx, self.fabric.local_idx)
        total_V = all_NLV.sum((0, 1))
        self.load = Load(total_V[E : 2 * E], int(total_V[-1]), traffic.busiest_rows)
        return traffic

    def _degrees(self, traffic: Traffic) -> Degrees:
        degrees = self.schedule if isinstance(self.schedule, Degrees) else self.schedule(traffic.busiest_rows)
        if self.hooks.inside:  # chunk hooks keep a graph for each forward chunk
            return Degrees(degrees.forward, degrees.forward)
        return degrees


class MoELayer(nn.Module):
    """x[..., T, D] -> y of the same shape: gate, experts on all ranks of `mesh`, combination.

    mesh: None (one process), one dim (expert parallelism) or two ("node", "local"); every rank calls with tokens of
    its own, any number, zero included. Each row of leading dims is one group (a sequence) to gates that compare
    tokens. order: "index", "einsum", or None for what suits the gate.
    `aux_loss` of the last forward is this rank's share of the balancing loss (zero for gates without one); shares,
    like all losses here, add up over ranks: divide token losses by the tokens of all ranks, and sum gradients of
    replicated parameters (training/gradients.py does).
    Errors: ValueError for sizes that do not match, on every rank for settings that differ between ranks.
    """

    def __init__(
        self,
        *,
        gate: Gate,
        experts: ExpertSpec,
        mesh: DeviceMesh | Fabric | None = None,
        order: str | None = None,
        schedule: Degrees | Callable[[int], Degrees] = UNSCHEDULED,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        super().__init__()
        if (gate.d_model, gate.num_experts) != (experts.d_model, experts.num_experts):
            raise ValueError(
                f"MoELayer: the gate is for D={gate.d_model}, E={gate.num_experts}, "
                f"the experts for D={experts.d_model}, E={experts.num_experts}; give both the same"
            )
        if order not in ORDERS:
            raise ValueError(f"MoELayer: order {order!r} is unknown; expected index or einsum")
        self.experts = ShardedExperts(experts, mesh, schedule=schedule, hooks=hooks)
        fabric = self.experts.fabric
        fabric.must_agree("the gate", (*_settings(gate), order))
        self.gate = gate.to(fabric.device)
        self.order, self.hooks = order, hooks
        for tensor in gate.state_dict().values():
            fabric.copy_from_first(tensor)
        self.aux_loss = torch.zeros((), device=fabric.device)

    def forward(self, x: Tensor) -> Tensor:
        D = self.gate.d_model
        if x.dim() < 2 or x.shape[-1] != D:
            raise ValueError(f"MoELayer: expected x of [..., T, {D}], got {tuple(x.shape)}")
        x = call(self.hooks.before_moe_start, "before_moe_start", x)
        x_GTD = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
        routing = self.gate(x_GTD)
        if isinstance(routing.choice, Mixture) and self.order == "index":
            raise ValueError("MoELayer: this gate mixes tokens, it picks none; leave order at None or einsum")
        y_TD = self.experts.run(x_GTD.flatten(0, 1), routing.choice, self.order, routing.balance)
        load = self.experts.load
        assert load is not None
        if routing.balance is not None:
            self.aux_loss = routing.balance.loss(load.assigned_E.to(x.device), load.num_tokens)
        return call(self.hooks.before_moe_end, "before_moe_end", y_TD.view(x.shape))


def _settings(gate: Gate) -> tuple[str, list[str], dict[str, int | float | str | None]]:
    """Its kind, its parameters, and what its user chose: plain attributes, as top_k and capacity_factor."""
    plain = {
        name: value
        for name, value in vars(gate).items()
        if not name.startswith("_") and name != "training" and isinstance(value, int | float | str | None)
    }
    return type(gate).__name__, list(gate.state_dict()), plain


def aux_loss(model: nn.Module) -> Tensor:
    """Sum of the layers' balancing losses in the last forward, this rank's share."""
    return torch.stack([m.aux_loss for m in model.modules() if isinstance(m, MoELayer)]).sum()
