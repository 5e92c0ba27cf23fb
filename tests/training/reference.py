"""The dense reference: one process, every expert on every token, plain autograd, no exchange and no order."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hostcompute import Activation, ActivationKind, DType, ExpertSpec
from monde.executors.activations import activate
from monde.routing.gates import Gate, GShardGate, Mixture, make_gate
from monde.training.layer import MoELayer

D, F = 16, 12
KINDS = {
    "gpt": dict(gated=False, activation=Activation(ActivationKind.GELU_TANH), has_bias=True),
    "gated": dict(gated=True, activation=Activation(ActivationKind.SILU), has_bias=False),
    "gated_bias": dict(gated=True, activation=Activation(ActivationKind.SILU), has_bias=True),
}
GATE_OPTIONS: dict[str, dict[str, Any]] = {
    "gshard": {},
    "sigmoid": {"top_k": 3},
    "xmoe": {},
    "expert_choice": {},
    "softmoe": {"slots_per_expert": 2},
}


def spec(kind: str, num_experts: int, dtype: DType = DType.F32) -> ExpertSpec:
    return ExpertSpec(num_experts, D, F, dtype=dtype, **KINDS[kind])  # type: ignore[arg-type]


class KnownNoiseGate(GShardGate):
    """GShard whose noise depends on the token alone, so that it is the same wherever the token lies."""

    def noise(self, x_TD: Tensor) -> Tensor:
        e_E = torch.arange(1, self.num_experts + 1)
        return torch.sin(37.0 * x_TD[:, :1] * e_E + 11.0 * x_TD[:, 1:2]).detach()


def gate_of(name: str, num_experts: int, **options: Any) -> Gate:
    torch.manual_seed(3)
    options = GATE_OPTIONS[name] | options
    if name == "gshard":
        gate: Gate = KnownNoiseGate(D, num_experts, **options)
        torch.nn.init.normal_(gate.noise_ED, std=0.3)  # type: ignore[arg-type]
        return gate
    return make_gate(name, D, num_experts, **options)


def layer_of(gate: Gate, expert_spec: ExpertSpec, mesh: Any = None, **settings: Any) -> MoELayer:
    """Random biases too; the same values on any mesh."""
    torch.manual_seed(5)
    layer = MoELayer(gate=gate, experts=expert_spec, mesh=mesh, **settings)
    weights = layer.experts.weights
    with torch.no_grad():
        for i, (name, shape) in enumerate(weights.global_shapes().items()):
            if name.endswith("bias"):
                whole = torch.randn(shape, generator=torch.Generator().manual_seed(i))
                weights.get_parameter(name).copy_(weights.slice_of(name, whole))
    return layer


def expert(w: dict[str, Tensor], spec: ExpertSpec, e: int, x_TD: Tensor) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        bias = w[f"{name}_bias"][e] if spec.has_bias else None
        return torch.nn.functional.linear(x, w[name][e], bias)

    up = linear("up", x_TD)
    hidden = (
        activate(spec.activation, linear("gate", x_TD), up)
        if spec.gated
        else activate(spec.activation, up, None)
    )
    return linear("down", hidden)


@dataclass(frozen=True)
class Answer:
    """Outputs, and gradients by name; gradients of experts over all experts."""

    y: Tensor
    aux: Tensor
    grads: dict[str, Tensor]


def dense(
    layer: MoELayer, batches: list[Tensor], cotangents: list[Tensor], aux_weight: float, dtype: torch.dtype
) -> Answer:
    """What `layer` (of one process) must give for all ranks' batches [G, T, D] together, computed in `dtype`."""
    gate = copy.deepcopy(layer.gate).to(dtype)
    weights = {n: p.detach().to(dtype).requires_grad_() for n, p in layer.experts.weights.weights().items()}
    xs = [x.detach().to(dtype).requires_grad_() for x in batches]
    E = gate.num_experts
    outputs, balances = [], []
    for x_GTD in xs:
        routing = gate(x_GTD)
        x_TD = x_GTD.flatten(0, 1)
        balances.append(routing.balance)
        choice = routing.choice
        if isinstance(choice, Mixture):
            per = choice.dispatch_GTS.shape[2] // E
            slots_GSD = torch.einsum("gts,gtd->gsd", choice.dispatch_GTS.to(dtype), x_GTD)
            made = [
                expert(weights, layer.experts.weights.spec, s // per, slots_GSD[:, s]) for s in range(E * per)
            ]
            y_TD = torch.einsum("gts,gsd->gtd", choice.combine_GTS.to(dtype), torch.stack(made, 1)).flatten(
                0, 1
            )
        else:
            y_TD = torch.zeros_like(x_TD)
            for e in range(E):
                mine = choice.expert_R == e
                weight_T = torch.zeros(len(x_TD), dtype=dtype).index_add(
                    0, choice.token_R[mine], choice.weight_R[mine].to(dtype)
                )
                y_TD = y_TD + weight_T[:, None] * expert(weights, layer.experts.weights.spec, e, x_TD)
        outputs.append(y_TD.view(x_GTD.shape))
    aux = torch.zeros((), dtype=dtype)
    if balances[0] is not None:
        total_E = sum(b.assigned_E for b in balances)
        num_tokens = sum(x.shape[0] * x.shape[1] for x in xs)
        aux = sum(b.loss(total_E, num_tokens) for b in balances)
    loss = sum((y * c.to(dtype)).sum() for y, c in zip(outputs, cotangents, strict=True)) + aux_weight * aux
    loss.backward()
    grads = {f"weights.{n}": p.grad for n, p in weights.items() if p.grad is not None}
    grads |= {f"gate.{n}": p.grad for n, p in gate.named_parameters() if p.grad is not None}
    grads |= {f"x{i}": x.grad for i, x in enumerate(xs) if x.grad is not None}
    return Answer(torch.cat([y.detach().flatten(0, 1) for y in outputs]), aux.detach(), grads)


def run_layer(
    layer: MoELayer, x: Tensor, cotangent: Tensor, aux_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, aux share and gradient of x; parameters' gradients are left in the layer."""
    x = x.detach().requires_grad_()
    y = layer(x)
    ((y * cotangent).sum() + aux_weight * layer.aux_loss).backward()
    assert x.grad is not None
    return y.detach(), layer.aux_loss.detach(), x.grad


def assert_close(name: str, got: Tensor, exact: Tensor, same_type: Tensor) -> None:
    """`same_type`: the dense reference in got's own type. Two correct evaluations differ from `exact` by about the
    same rounding: 8 such errors, plus 8 units in the last place of the largest value.

    Errors: AssertionError with the worst element and where it is.
    """
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    rounding = float((same_type.double() - exact.double()).abs().max())
    tolerance = 8 * (rounding + torch.finfo(got.dtype).eps * float(exact.abs().max()))
    error = (got.double() - exact.double()).abs()
    worst = torch.unravel_index(error.argmax(), error.shape)
    where = tuple(int(i) for i in worst)
    assert float(error.max()) <= tolerance, (
        f"{name}: worst at {where}: got {got[worst]}, expected {exact[worst]}, allowed {tolerance:.3g}"
    )


def packed(value: Any) -> bytes:
    """For the way from a rank: a tensor itself would live in memory that dies with the rank."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
