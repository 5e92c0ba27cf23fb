"""Shared experts beside the routed ones: in decode the GPU computes them while it waits for the host.

A block's shared expert takes what the routed experts take, but models call one after the other, on one stream. Here
the shared expert of a decode step runs on a second stream, which is joined where the routed experts end:

    shared first    its kernels go to the second stream when the model calls it
    routed first    it is started with the routed experts, from their input; the model's call finds the result

Which of them a block is, and that nothing else depends on the order, is found by trying it at load time, not by name.
Blocks for which it does not hold (latent experts, shared experts that take weights of the router, blocks that need
more than hidden states) keep the model's order. So do prompts: their workspace is part of the memory plan, and would
lie in the pools of two streams.

T tokens, B sequences, D model dim.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monde.executors.decode import MAX_DECODE_TOKENS
from monde.models.experts import ExpertsModule

_NAMES = ("shared_experts", "shared_expert", "shared_mlp")


class Order(enum.Enum):
    """What a block calls first; AS_IS: it must stay as it is."""

    SHARED_FIRST = "shared first"
    ROUTED_FIRST = "routed first"
    AS_IS = "as is"


class Side(Protocol):
    """Where work goes that others need not wait for yet."""

    device_type: str

    def run(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """work(x), not to be looked at before `join`."""

    def join(self) -> None:
        """All that `run` gave is ready for what the caller launches from here on."""


class CudaSide:
    """A second stream. A run begins after what the caller's stream holds; a join makes that stream wait."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)

    def run(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            y = work(x)
        # The next run may follow another caller, who has not waited for this one's last look at y.
        if not torch.cuda.is_current_stream_capturing():
            y.record_stream(caller)
        return y

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._stream)


class _UnderWay(threading.local):
    """A thread's: whether something runs on the side, and what was computed early, the shared expert's y_TD of x_TD."""

    is_running = False
    x_TD: Tensor | None = None
    y_TD: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _UnderWay:
        return _UnderWay()


class Block:
    """One shared expert and the routed experts next to it. Its hooks are deep-copied with the model's modules."""

    def __init__(self, side: Side, order: Order, routed: nn.Module, shared: nn.Module) -> None:
        self.order, self._side, self._mine = order, side, _UnderWay()
        self._plain = shared.forward
        shared.forward = self._forward_shared
        routed.register_forward_pre_hook(self._before_routed)
        routed.register_forward_hook(self._after_routed)

    def _forward_shared(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._plain(x)  # type: ignore[no-any-return]
        if self.order is Order.SHARED_FIRST and self._may_move(x):
            return self._run(x)
        early_x_TD, early_y_TD = self._mine.x_TD, self._mine.y_TD
        self._mine.x_TD = self._mine.y_TD = None
        if early_x_TD is None or early_y_TD is None or not _is_same(early_x_TD, x):
            return self._plain(x)  # type: ignore[no-any-return]
        return early_y_TD.view(*x.shape[:-1], -1)

    def _before_routed(self, routed: nn.Module, args: tuple[Any, ...]) -> None:
        if self.order is Order.ROUTED_FIRST and not torch.compiler.is_compiling():
            x_TD = args[0] if self._may_move(args[0]) else None
            self._mine.x_TD, self._mine.y_TD = x_TD, None if x_TD is None else self._run(x_TD)

    def _after_routed(self, routed: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and self._mine.is_running:
            self._mine.is_running = False
            self._side.join()

    def _may_move(self, x: Tensor) -> bool:
        return x.device.type == self._side.device_type and 0 < x.numel() <= MAX_DECODE_TOKENS * x.shape[-1]

    def _run(self, x: Tensor) -> Tensor:
        self._mine.is_running = True
        return self._side.run(self._plain, x)


def run_shared_beside(model: Any, modules: Sequence[ExpertsModule], side: Side) -> dict[str, Order]:
    """Let shared experts of `model` run on `side` where that changes nothing: the order of each block that has some."""
    d_model = model.config.get_text_config().hidden_size
    orders = {}
    for owner_path, routed, shared in shared_experts(model, modules):
        owner = model.get_submodule(owner_path)
        order = orders[owner_path] = order_of(owner, routed, shared, d_model)
        if order is not Order.AS_IS:
            Block(side, order, routed, shared)
    return orders


def shared_experts(
    model: Any, modules: Sequence[ExpertsModule]
) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path of a block, its routed experts, its shared expert) where there is one."""
    for path, routed in (place for module in modules for place in module.places()):
        owner_path = path.rpartition(".")[0]
        owner = model.get_submodule(owner_path)
        found = (getattr(owner, name, None) for name in _NAMES)
        shared = next((module for module in found if isinstance(module, nn.Module)), None)
        if shared is not None:
            yield owner_path, routed, shared


# ---- trying a block ----
def order_of(owner: nn.Module, routed: nn.Module, shared: nn.Module, d_model: int) -> Order:
    """Run `owner` on random hidden states, with nothing in the place of the routed experts, and watch."""
    weight = next(shared.parameters(), None)
    if weight is None or weight.is_meta:
        return Order.AS_IS
    x_BTD = torch.randn(1, 2, d_model, generator=torch.Generator().manual_seed(0)).to(weight)
    watch = _Watch(shared.forward)
    try:
        with torch.no_grad(), _in_place_of(routed, watch.routed), _in_place_of(shared, watch.shared), watch:
            owner(x_BTD)
    except Exception:  # it takes more than hidden states, or its experts take others
        return Order.AS_IS
    return watch.order()


class _Watch(TorchDispatchMode):
    """Stands in for the experts of one block, and sees every operation between their calls."""

    def __init__(self, shared_forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shared_forward = shared_forward
        self._calls: list[str] = []
        self._shared_x = self._shared_y = self._routed_x = torch.empty(0)
        self._is_disturbed = False  # somebody reads the shared expert's output, or writes what experts read

    def routed(self, x_TD: Tensor, *of_the_router: Any) -> Tensor:
        self._calls.append("routed")
        self._routed_x = x_TD
        return torch.zeros_like(x_TD)

    def shared(self, x: Tensor) -> Tensor:
        """Errors: TypeError where it is given more."""
        self._shared_x, self._shared_y = x, self._shared_forward(x)
        self._calls.append("shared")
        return self._shared_y

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if len(self._calls) == 1:
            used = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            if self._calls == ["shared"] and _storage(self._shared_y) in used:
                self._is_disturbed |= not func.is_view
            if func._schema.is_mutable:
                x = self._shared_x if self._calls == ["shared"] else self._routed_x
                self._is_disturbed |= _storage(x) in used
        return result

    def order(self) -> Order:
        if self._is_disturbed:
            return Order.AS_IS
        if self._calls == ["shared", "routed"]:
            return Order.SHARED_FIRST
        if self._calls == ["routed", "shared"] and _is_same(self._routed_x, self._shared_x):
            early = self._shared_forward(self._routed_x).view(self._shared_y.shape)
            return Order.ROUTED_FIRST if torch.equal(early, self._shared_y) else Order.AS_IS
        return Order.AS_IS


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same numbers at the same place, in shapes that may differ."""
    are_dense = a.is_contiguous() and b.is_contiguous()
    return are_dense and a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype


@contextmanager
def _in_place_of(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    kept = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if kept is None:
            del module.forward
        else:
            module.forward = kept
