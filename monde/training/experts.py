"""The experts that one rank holds: whole numbers of them along E, a slice of each along F.

Letters: R rows, E experts of this rank, D model dim, F the slice of the hidden dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hostcompute import DType, ExpertSpec
from monde.executors.activations import activate
from monde.training import grouped
from monde.training.fabric import Fabric
from monde.training.traffic import shard_bounds

_DTYPES = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16}
# Where E and F are among a parameter's dims; None: the parameter has no F.
F_DIM: dict[str, int | None] = {
    "gate": 1,
    "up": 1,
    "down": 2,
    "gate_bias": 1,
    "up_bias": 1,
    "down_bias": None,
}


class ExpertWeights(nn.Module):
    """Parameters gate, up [E, F, D], down [E, D, F] and biases, as hostcompute.ExpertSpec defines experts.

    Initial values follow from torch's seed on the mesh's first rank, however experts lie on ranks.
    """

    def __init__(self, spec: ExpertSpec, fabric: Fabric, *, initialise: bool = True) -> None:
        super().__init__()
        self.spec, self.fabric = spec, fabric
        E_bounds, F_bounds = (
            shard_bounds(spec.num_experts, fabric.num_nodes),
            shard_bounds(spec.d_ffn, fabric.num_local),
        )
        self.expert_range = slice(E_bounds[fabric.node_idx], E_bounds[fabric.node_idx + 1])
        self.ffn_range = slice(F_bounds[fabric.local_idx], F_bounds[fabric.local_idx + 1])
        for name, shape in self.global_shapes().items():
            local = torch.zeros(self.slice_of(name, torch.empty(shape, device="meta")).shape)
            self.register_parameter(name, nn.Parameter(local.to(fabric.device, _DTYPES[spec.dtype])))
        if initialise:
            self.reset_parameters()

    def global_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, over all ranks."""
        E, D, F = self.spec.num_experts, self.spec.d_model, self.spec.d_ffn
        shapes: dict[str, tuple[int, ...]] = {"up": (E, F, D), "down": (E, D, F)}
        if self.spec.has_bias:
            shapes |= {"up_bias": (E, F), "down_bias": (E, D)}
        if self.spec.gated:
            shapes["gate"] = (E, F, D)
            if self.spec.has_bias:
                shapes["gate_bias"] = (E, F)
        return shapes

    def slice_of(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a parameter given over all ranks, a view."""
        part = whole[self.expert_range]
        dim = F_DIM[name]
        return part if dim is None else part[(slice(None),) * dim + (self.ffn_range,)]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices of variance 1 / fan_in, biases zero. Every expert has a seed of its own."""
        seed = torch.randint(2**62, (1,), device=self.fabric.device)
        self.fabric.copy_from_first(seed)
        generator = torch.Generator()
        for position, (name, shape) in enumerate(self.global_shapes().items()):
            if name.endswith("bias"):
                continue
            for e in range(self.expert_range.start, self.expert_range.stop):
                generator.manual_seed((int(seed) + 16 * e + position) % 2**62)
                whole = torch.randn(shape[1:], generator=generator) * shape[-1] ** -0.5
                dim = F_DIM[name]
                assert dim is not None
                part = whole[(slice(None),) * (dim - 1) + (self.ffn_range,)]
                self.get_parameter(name)[e - self.expert_range.start].copy_(part)

    def weights(self) -> dict[str, Tensor]:
        return dict(self.named_parameters(recurse=False))

    def forward(self, x_RD: Tensor, counts_E: list[int], w: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """y_RD of rows that lie expert by expert, this slice's part, and what `backward` needs of the rows."""
        hidden = [grouped.linear(x_RD, w[name], counts_E, w.get(f"{name}_bias")) for name in self._inputs()]
        act_RF = activate(self.spec.activation, hidden[0], hidden[1] if self.spec.gated else None)
        bias_ED = (
            w.get("down_bias") if self.fabric.local_idx == 0 else None
        )  # parts are summed: once is enough
        return grouped.linear(act_RF, w["down"], counts_E, bias_ED), [x_RD, *hidden]

    def backward(
        self,
        grad_RD: Tensor,
        saved: list[Tensor],
        counts_E: list[int],
        w: dict[str, Tensor],
        grads: dict[str, Tensor],
    ) -> Tensor:
        """grad of x_RD, this slice's part; adds to `grads` of those weights that want one.

        The activation is computed again rather than kept: R * F elements less memory for an elementwise pass.
        """
        x_RD, hidden = saved[0], saved[1:]
        with torch.enable_grad():
            inputs = [h.detach().requires_grad_() for h in hidden]
            act_RF = activate(self.spec.activation, inputs[0], inputs[1] if self.spec.gated else None)
        grad_act_RF = grouped.linear(grad_RD, w["down"].transpose(1, 2), counts_E)
        if "down" in grads:
            grouped.add_weight_gradient(grad_RD, act_RF.detach(), counts_E, grads["down"])
        if "down_bias" in grads:  # every slice has all rows, so replicas of the bias get the same gradient
            grouped.add_bias_gradient(grad_RD, counts_E, grads["down_bias"])
        grad_x_RD = torch.zeros_like(x_RD)
        for name, grad_RF in zip(
            self._inputs(), torch.autograd.grad(act_RF, inputs, grad_act_RF), strict=True
        ):
            grad_x_RD += grouped.linear(grad_RF, w[name].transpose(1, 2), counts_E)
            if name in grads:
                grouped.add_weight_gradient(grad_RF, x_RD, counts_E, grads[name])
            if f"{name}_bias" in grads:
                grouped.add_bias_gradient(grad_RF, counts_E, grads[f"{name}_bias"])
        return grad_x_RD

    def _inputs(self) -> tuple[str, ...]:
        return ("gate", "up") if self.spec.gated else ("up",)
