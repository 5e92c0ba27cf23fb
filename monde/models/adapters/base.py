"""How a family's experts look from outside: where their weights lie and how calls reach them.

Letters: T tokens, E experts, K top-k, D model dim, F expert hidden dim.

An adapter turns one kind of module into data (`ExpertSpec`, `ExpertLayout`) plus one small forward. The same
layout reads live parameters (`monde.offload`) and checkpoint tensors (`monde.from_pretrained`), because it is
expressed in the module's own parameter names and shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hostcompute import DType, ExpertSpec
from monde.config import MondeConfig

# experts(x_TD, topk_ids_TK, topk_weights_TK) -> y_TD: sum over k of weight * expert(x), in x's dtype.
# Pairs with weight 0 or an id outside [0, E) contribute nothing.
ExpertsFn = Callable[[Tensor, Tensor, Tensor], Tensor]

_DTYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F16}


def spec_dtype(dtype: torch.dtype) -> DType:
    """Errors: ValueError for element types experts cannot be stored in."""
    if dtype not in _DTYPES:
        raise ValueError(
            f"experts of {dtype} are not supported; load the model in float32, bfloat16 or float16"
        )
    return _DTYPES[dtype]


class ExpertAxis(Enum):
    """How a parameter holds all experts."""

    STACKED = "[E, ...]"
    FLAT = "[E * n, ...]"  # expert e is rows e*n .. (e+1)*n
    NAMED = "one parameter per expert, `{e}` in its name"


@dataclass(frozen=True)
class WeightView:
    """Where one matrix or bias of expert e lies, as a strided view of a parameter.

    `param` is relative to the adapted module and may be dotted. `transposed` says that the expert's own slice
    is stored [in, out]. Of the `num_parts` matrices fused along the output rows this is number `part`,
    strided when `interleaved`.
    """

    param: str
    axis: ExpertAxis = ExpertAxis.STACKED
    transposed: bool = False
    part: int = 0
    num_parts: int = 1
    interleaved: bool = False

    def param_name(self, expert_id: int) -> str:
        return self.param.replace("{e}", str(expert_id)) if self.axis is ExpertAxis.NAMED else self.param

    def slab(self, param: Tensor, expert_id: int, num_experts: int) -> Tensor:
        """Expert `expert_id`'s own slice of a whole parameter, as stored."""
        if self.axis is ExpertAxis.NAMED:
            return param
        if self.axis is ExpertAxis.STACKED:
            return param[expert_id]
        num_rows = param.shape[0] // num_experts
        return param.narrow(0, expert_id * num_rows, num_rows)

    def matrix(self, slab: Tensor) -> Tensor:
        """The [out, in] matrix (or the bias) inside the expert's own slice; a view, never a copy."""
        rows = slab.t() if self.transposed and slab.dim() == 2 else slab
        if self.num_parts == 1:
            return rows
        if self.interleaved:
            return rows[self.part :: self.num_parts]
        size = rows.shape[0] // self.num_parts
        return rows.narrow(0, self.part * size, size)

    def of(self, param: Tensor, expert_id: int, num_experts: int) -> Tensor:
        return self.matrix(self.slab(param, expert_id, num_experts))


@dataclass(frozen=True)
class ExpertLayout:
    """One view per array that `ExpertBank.load` takes; None where the family has no such array."""

    up: WeightView
    down: WeightView
    gate: WeightView | None = None
    up_bias: WeightView | None = None
    down_bias: WeightView | None = None
    gate_bias: WeightView | None = None

    def roles(self) -> Iterator[tuple[str, WeightView]]:
        """(keyword of ExpertBank.load, view) pairs that exist."""
        for field in fields(self):
            view = getattr(self, field.name)
            if view is not None:
                yield field.name, view

    def param_names(self, num_experts: int) -> list[str]:
        """Every parameter of the module that holds experts, in a fixed order without repeats."""
        names: dict[str, None] = {}
        for _, view in self.roles():
            for expert_id in range(num_experts if view.axis is ExpertAxis.NAMED else 1):
                names[view.param_name(expert_id)] = None
        return list(names)


def fused_gate_up(
    name: str, *, transposed: bool = False, interleaved: bool = False
) -> tuple[WeightView, WeightView]:
    """The (gate, up) views of one parameter that holds both, gate first."""
    return (
        WeightView(name, transposed=transposed, part=0, num_parts=2, interleaved=interleaved),
        WeightView(name, transposed=transposed, part=1, num_parts=2, interleaved=interleaved),
    )


class Adapter(ABC):
    """Everything monde must know about one kind of module that holds experts. Stateless.

    Most families share `ExpertsInterfaceAdapter`. The others subclass this one, list the module class names
    they serve, and write `layout`, `spec` and `forward`. Modules may be on the meta device: read shapes only.
    """

    class_names: tuple[str, ...] = ()

    def matches(self, module: nn.Module) -> bool:
        return type(module).__name__ in self.class_names

    @abstractmethod
    def layout(self, module: nn.Module) -> ExpertLayout:
        """Where the weights lie in `module`'s parameters."""

    @abstractmethod
    def spec(self, module: nn.Module) -> ExpertSpec:
        """Shape, activation and storage type (from the parameters' dtype, see `spec_dtype`)."""

    @abstractmethod
    def forward(self, module: nn.Module, experts: ExpertsFn, *args: Any, **kwargs: Any) -> Any:
        """What `module.forward(*args, **kwargs)` returned, computed through `experts`.

        Runs under torch.compile(fullgraph=True): no data-dependent python. Three recipes cover what
        `experts` does not do itself:
        a per-pair output (norm after each expert): one token per pair, see `per_pair`;
        a weight on the input instead of the output: scale x per pair and pass weights of one;
        identity experts: ids >= E contribute nothing, so add x times their weights afterwards.
        """

    def configured(self, config: MondeConfig) -> Adapter:
        """The adapter to attach under `config`; only a family with an option of its own differs."""
        return self

    def attach(self, module: nn.Module, experts: ExpertsFn) -> None:
        """Make `module` call `experts` from now on. Its expert parameters are gone by then."""
        module.forward = partial(self.forward, module, experts)

    def detach(self, module: nn.Module) -> None:
        """Undo `attach`."""
        module.__dict__.pop("forward", None)


def per_pair(experts: ExpertsFn, x_TD: Tensor, topk_ids_TK: Tensor, scale_TK: Tensor | None = None) -> Tensor:
    """Unweighted output of every routed pair, y_TKD; `scale_TK` multiplies the pair's input."""
    T, K = topk_ids_TK.shape
    x_TKD = x_TD[:, None, :].expand(T, K, x_TD.shape[-1])
    if scale_TK is not None:
        x_TKD = x_TKD * scale_TK[:, :, None].to(x_TD.dtype)
    ones_R1 = torch.ones(T * K, 1, dtype=torch.float32, device=x_TD.device)
    y_RD = experts(x_TKD.reshape(T * K, -1), topk_ids_TK.reshape(T * K, 1), ones_R1)
    return y_RD.view(T, K, -1)
