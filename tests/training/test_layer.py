"""Layers on 1, 2 and 4 ranks against the dense reference: outputs, losses and every gradient."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from hostcompute import DType
from monde.planning.pipeline import UNSCHEDULED, Degrees
from monde.routing.gates import make_gate
from monde.training.fabric import Fabric
from monde.training.hooks import Hooks
from monde.training.layer import MoELayer
from tests.distributed.ranks import RankFailed, run_ranks
from tests.training.reference import (
    GATE_OPTIONS,
    D,
    assert_close,
    dense,
    gate_of,
    layer_of,
    packed,
    run_layer,
    spec,
    unpacked,
)

E = 5  # divides by no number of ranks here
TOKENS = [9, 0, 4, 3]  # by rank: uneven, one without any
AUX = 0.3


@dataclass(frozen=True)
class Case:
    gate: str
    kind: str = "gated"
    dtype: DType = DType.F32
    degrees: Degrees = UNSCHEDULED
    order: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    hooked: bool = False
    checkpointed: bool = False


CASES = [
    *(Case(gate, kind) for gate in GATE_OPTIONS for kind in ("gpt", "gated")),
    *(Case(gate, degrees=Degrees(2, 3)) for gate in GATE_OPTIONS),
    *(Case(gate, dtype=DType.BF16, degrees=Degrees(3, 2)) for gate in GATE_OPTIONS),
    *(Case(gate, order="einsum", degrees=Degrees(2, 1)) for gate in GATE_OPTIONS if gate != "softmoe"),
    Case("gshard", "gated_bias", degrees=Degrees(16, 5)),
    Case("sigmoid", degrees=Degrees(2, 3), options=(("top_k", 1),)),
    Case("gshard", degrees=Degrees(2, 2), options=(("capacity_factor", 0.7),)),
    Case("gshard", "gpt", degrees=Degrees(2, 4), hooked=True),
    Case("xmoe", degrees=Degrees(2, 4), checkpointed=True),
]
TORCH = {DType.F32: torch.float32, DType.BF16: torch.bfloat16}


def batch(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(2, TOKENS[rank], D, generator=generator) + torch.linspace(0, 1.5, D)  # skewed routing
    return x.to(dtype), torch.randn(2, TOKENS[rank], D, generator=generator).to(dtype)


def hooks_of(case: Case) -> Hooks:
    """Each its own differentiable change; together they leave what a dense layer computes on changed inputs."""
    if not case.hooked:
        return Hooks()
    return Hooks(
        before_moe_start=lambda x: x * 2,
        before_dispatch=lambda x: x.sin(),
        after_dispatch=lambda x: x.asin(),
        before_combine=lambda y: y * 3,
        after_combine=lambda y: y / 3,
        before_moe_end=lambda y: y / 2,
    )


def build(case: Case, mesh: Any = None) -> MoELayer:
    return layer_of(
        gate_of(case.gate, E, **dict(case.options)),
        spec(case.kind, E, case.dtype),
        mesh,
        order=case.order,
        schedule=case.degrees,
        hooks=hooks_of(case),
    )


def on_rank(cases: list[Case], mesh_shape: tuple[int, ...]) -> bytes:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("node", "local")[: len(mesh_shape)])
    answers = []
    for case in cases:
        layer = build(case, mesh)
        x, cotangent = batch(torch.distributed.get_rank(), TORCH[case.dtype])
        if case.hooked:
            x = x.clamp(-0.7, 0.7)
        if case.checkpointed:
            leaf = x.detach().requires_grad_()
            y = checkpoint(layer, leaf, use_reentrant=False)
            ((y * cotangent).sum() + AUX * layer.aux_loss).backward()
            y, aux, grad_x = y.detach(), layer.aux_loss.detach(), leaf.grad
        else:
            y, aux, grad_x = run_layer(layer, x, cotangent, AUX)
        weights = layer.experts.weights
        assert layer.experts.load is not None
        answers.append(
            {
                "y": y.flatten(0, 1),
                "aux": aux,
                "grad_x": grad_x,
                "gate": {n: p.grad for n, p in layer.gate.named_parameters()},
                "weights": {n: p.grad for n, p in weights.weights().items()},
                "ranges": (weights.expert_range, weights.ffn_range),
                "assigned_E": layer.experts.load.assigned_E,
            }
        )
    return packed(answers)


def check(case: Case, answers: list[dict[str, Any]]) -> None:
    batches = [batch(rank, TORCH[case.dtype]) for rank in range(len(answers))]
    xs = [x.clamp(-0.7, 0.7) if case.hooked else x for x, _ in batches]
    cotangents = [c for _, c in batches]
    layer = build(case)
    if case.hooked:  # the inner hooks undo each other; the outer ones scale input and output
        exact, same = (
            dense(layer, [2 * x for x in xs], [c / 2 for c in cotangents], AUX, dtype)
            for dtype in (torch.float64, TORCH[case.dtype])
        )
        for answer in (exact, same):
            answer.y.div_(2)
            for name in answer.grads:
                if name.startswith("x"):
                    answer.grads[name].mul_(2)
    else:
        exact, same = (dense(layer, xs, cotangents, AUX, d) for d in (torch.float64, TORCH[case.dtype]))
    assert_close("y", torch.cat([a["y"] for a in answers]), exact.y, same.y)
    assert_close("aux", sum(a["aux"] for a in answers), exact.aux, same.aux)  # type: ignore[arg-type]
    for rank, answer in enumerate(answers):
        assert_close(f"grad x{rank}", answer["grad_x"], exact.grads[f"x{rank}"], same.grads[f"x{rank}"])
        for name, grad in answer["weights"].items():
            parts = []
            for whole in (exact.grads[f"weights.{name}"], same.grads[f"weights.{name}"]):
                experts, ffn = answer["ranges"]
                part = whole[experts]
                if name != "down_bias":
                    dim = 2 if name == "down" else 1
                    part = part.narrow(dim, ffn.start, ffn.stop - ffn.start)
                parts.append(part)
            assert_close(f"grad {name} on rank {rank}", grad, *parts)
    for name in answers[0]["gate"]:
        grad = sum(a["gate"][name] for a in answers)
        if f"gate.{name}" in exact.grads:
            assert_close(f"grad gate {name}", grad, exact.grads[f"gate.{name}"], same.grads[f"gate.{name}"])


@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (1, 2), (4,), (2, 2)], ids=str)
def test_equals_the_dense_layer(mesh_shape: tuple[int, ...], tmp_path: Path) -> None:
    num_ranks = torch.Size(mesh_shape).numel()
    sent = run_ranks(on_rank, num_ranks, tmp_path, CASES, mesh_shape, deadline_s=240)
    by_rank = [unpacked(one) for one in sent]
    for i, case in enumerate(CASES):
        try:
            check(case, [answers[i] for answers in by_rank])
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
    loads = [answers["assigned_E"] for answers in by_rank[0]]
    assert any(int(load.min()) == 0 for load in loads), "no case has an expert without tokens"


@pytest.mark.parametrize("gate", GATE_OPTIONS)
def test_capacity_and_nothing_at_all(gate: str) -> None:
    """A batch without tokens trains nothing and fails nowhere."""
    layer = build(Case(gate, degrees=Degrees(2, 2)))
    x = torch.zeros(0, 3, D, requires_grad=True)
    layer(x).sum().backward()
    assert all(not p.grad.any() for p in layer.experts.parameters() if p.grad is not None)


def test_capacity_keeps_first_choices_of_early_tokens() -> None:
    gate = gate_of("gshard", 2, top_k=1, capacity_factor=0.5).eval()
    with torch.no_grad():
        gate.weight_ED.copy_(torch.stack((torch.ones(D), -torch.ones(D))))
    choice = gate(torch.ones(2, 8, D)).choice
    assert choice.token_R.tolist() == [0, 1, 8, 9]  # ceil(0.5 * 8 / 2) = 2 of each group
    assert choice.expert_R.tolist() == [0, 0, 0, 0]


def test_hooks_see_what_they_are_named_after() -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []
    names = (
        "before_moe_start",
        "before_dispatch",
        "after_dispatch",
        "before_combine",
        "after_combine",
        "before_moe_end",
    )
    hooks = Hooks(**{n: (lambda x, n=n: seen.append((n, tuple(x.shape)))) for n in names})  # type: ignore[arg-type,misc]
    layer = layer_of(gate_of("sigmoid", E, top_k=1), spec("gpt", E), hooks=hooks)
    layer(torch.randn(2, 3, D))
    assert seen == [(n, (2, 3, D) if "moe" in n else (6, D)) for n in names]


def test_users_mistakes() -> None:
    with pytest.raises(ValueError, match="gate 'topk' is unknown; expected one of gshard"):
        make_gate("topk", D, E)
    with pytest.raises(ValueError, match="give both the same"):
        layer_of(gate_of("sigmoid", E), spec("gpt", E + 1))
    with pytest.raises(ValueError, match="mixes tokens"):
        layer_of(gate_of("softmoe", E), spec("gpt", E), order="index")(torch.randn(4, D))
    with pytest.raises(ValueError, match="expected x of"):
        layer_of(gate_of("sigmoid", E), spec("gpt", E))(torch.randn(4, D + 1))
    for x_TD in (torch.randn(4, D).double(), torch.randn(4, D).bfloat16()):
        with pytest.raises(ValueError, match=r"experts: expected x of torch\.float32"):
            layer_of(gate_of("sigmoid", E), spec("gpt", E))(x_TD)
    with pytest.raises(ValueError, match="hook after_combine: expected"):
        layer_of(gate_of("sigmoid", E), spec("gpt", E), hooks=Hooks(after_combine=lambda y: y[:1]))(
            torch.randn(4, D)
        )


def disagree() -> None:
    mesh = init_device_mesh("cpu", (2,))
    num_experts = 4 + torch.distributed.get_rank()
    layer_of(gate_of("sigmoid", num_experts), spec("gpt", num_experts), mesh)


def other_gates() -> None:
    mesh = init_device_mesh("cpu", (2,))
    layer_of(gate_of("sigmoid", E, top_k=1 + torch.distributed.get_rank()), spec("gpt", E), mesh)


def three_dims() -> None:
    Fabric(init_device_mesh("cpu", (1, 2, 1)))


def not_in_the_mesh() -> None:
    from torch.distributed.device_mesh import DeviceMesh

    Fabric(DeviceMesh("cpu", [0]))


def crossed_meshes(shapes: list[tuple[int, int]]) -> tuple[str, float]:
    """Each rank brings a mesh of all ranks, in a shape of its own."""
    mesh = init_device_mesh("cpu", shapes[torch.distributed.get_rank()], mesh_dim_names=("node", "local"))
    start_s = time.monotonic()
    try:
        Fabric(mesh)
    except ValueError as error:
        return str(error), time.monotonic() - start_s
    return "", 0.0


@pytest.mark.parametrize("shapes", [[(2, 1), (1, 2)], [(4, 1), (4, 1), (1, 4), (4, 1)]], ids=str)
def test_ranks_of_other_meshes_all_say_so(shapes: list[tuple[int, int]], tmp_path: Path) -> None:
    """Sizes of exchanges would not tell: each of these ranks has one group of all, whatever it takes it for."""
    for message, seconds_s in run_ranks(crossed_meshes, len(shapes), tmp_path, shapes, deadline_s=30):
        assert message.startswith("the mesh differs between ranks (rank 0: [[0]")
        assert message.endswith("give all ranks the same")
        assert seconds_s < 5


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (disagree, "differs between ranks"),
        (other_gates, "the gate differs between ranks"),
        (three_dims, "expected one dim, or two"),
        (not_in_the_mesh, "rank 1 is not in it"),
    ],
)
def test_ranks_that_do_not_match(mistake: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=message):
        run_ranks(mistake, 2, tmp_path, deadline_s=20)
