"""The C++ backend: packed panels in a huge-page arena, kernels for the best ISA of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hostcompute import _native, env
from hostcompute.arrays import HostArray
from hostcompute.backends.base import ExpertWeights
from hostcompute.places import HostPlaces
from hostcompute.pool import shared_pool
from hostcompute.spec import ExpertSpec, RoutedCounts

_NUMPY = {"f32": np.float32, "bf16": np.uint16, "f16": np.float16}


def available_isas() -> list[str]:
    """ISAs this machine can run, best first."""
    return list(_native.available_isas())


def choose_isa(isa: str | None) -> tuple[str, str]:
    """The ISA to run and why. Errors: RuntimeError when the one that is asked for is absent here."""
    available = available_isas()
    asked, source = (isa, "isa argument") if isa else (env.forced_isa(), "MONDE_CPU_ISA")
    if asked is None:
        return available[0], f"{available[0]} is this CPU's best instruction set"
    if asked not in available:
        raise RuntimeError(f"{source}: {asked} cannot run here; this CPU has {', '.join(available)}")
    return asked, f"{asked} was forced by {source}, this CPU's best instruction set is {available[0]}"


class NativeBackend:
    """One layer's experts in C++."""

    name = "native"

    def __init__(
        self, spec: ExpertSpec, pool: Any = None, isa: str | None = None, places: HostPlaces | None = None
    ) -> None:
        self.spec = spec
        self.isa, _ = choose_isa(isa)
        act = spec.activation
        self._bank = _native.Bank(
            spec.num_experts,
            spec.d_model,
            spec.d_ffn,
            spec.gated,
            spec.has_bias,
            spec.dtype.value,
            act.kind.value,
            act.limit,
            act.alpha,
            self.isa,
            pool or shared_pool(),
            None if places is None else places.arena,
        )

    def load(self, expert_id: int, weights: ExpertWeights) -> None:
        views = {name: None if array is None else as_tuple(array) for name, array in vars(weights).items()}
        try:
            self._bank.load(expert_id, **views)
        except ValueError as error:
            raise ValueError(f"[load] expert {expert_id}: {error}; the checkpoint is damaged") from None

    def export(self, expert_id: int) -> ExpertWeights:
        E, D, F = self.spec.num_experts, self.spec.d_model, self.spec.d_ffn
        assert 0 <= expert_id < E
        shapes = {"up": (F, D), "down": (D, F)} | ({"gate": (F, D)} if self.spec.gated else {})
        exported: dict[str, HostArray] = {}
        for name, shape in shapes.items():
            to = np.empty(shape, dtype=_NUMPY[self.spec.dtype.value])
            self._bank.export_matrix(expert_id, name, to.ctypes.data)
            exported[name] = HostArray(to.ctypes.data, shape, (shape[1], 1), self.spec.dtype.value, to)
        if self.spec.has_bias:
            sizes = {"up_bias": F, "down_bias": D} | ({"gate_bias": F} if self.spec.gated else {})
            for name, size in sizes.items():
                view = HostArray(self._bank.bias_address(expert_id, name), (size,), (1,), "f32", self._bank)
                values = view.numpy().copy()
                exported[name] = HostArray(values.ctypes.data, (size,), (1,), "f32", values)
        return ExpertWeights(**exported)

    def release(self, expert_id: int) -> None:
        self._bank.release(expert_id)

    def forward(
        self, x: HostArray, topk_ids: HostArray, topk_weights: HostArray, out: HostArray
    ) -> RoutedCounts:
        try:
            return RoutedCounts(*self._bank.forward(*map(as_tuple, (x, topk_ids, topk_weights, out))))
        except IndexError as error:
            raise KeyError(
                f"[forward] expert {error} was never loaded into this bank; call load() first"
            ) from None

    def submit(
        self,
        x: HostArray,
        topk_ids: HostArray,
        topk_weights: HostArray,
        out: HostArray,
        cut_expert: int = -1,
        cut_panel: int = 0,
        experts_E: NDArray[np.bool_] | None = None,
        adds: bool = False,
    ) -> NativePending:
        arrays = map(as_tuple, (x, topk_ids, topk_weights, out))
        wanted = 0 if experts_E is None else experts_E.ctypes.data
        return NativePending(_native.submit(self._bank, *arrays, cut_expert, cut_panel, wanted, adds))

    @property
    def resident_bytes(self) -> int:
        return int(self._bank.resident_bytes)

    @property
    def native_bank(self) -> Any:
        """The C++ bank."""
        return self._bank

    @property
    def memory_range(self) -> tuple[int, int]:
        """Address and bytes of the arena, the places that banks share if they do: page aligned, so that it can be pinned."""
        address, num_bytes = self._bank.memory_range
        return address, num_bytes

    def close(self) -> None:
        # A forward still under way holds its own reference; the memory goes when it is done.
        self._bank = None


class NativePending:
    """A forward on the native submit thread."""

    def __init__(self, pending: Any) -> None:
        self._pending = pending

    def done(self) -> bool:
        return bool(self._pending.done())

    def wait_for(self, seconds_s: float) -> bool:
        return bool(self._pending.wait_for(seconds_s))

    @property
    def busy_s(self) -> float:
        return float(self._pending.busy_s)

    def wait(self) -> RoutedCounts:
        try:
            return RoutedCounts(*self._pending.wait())
        except IndexError as error:
            raise KeyError(
                f"[wait] expert {error} was never loaded into this bank; call load() first"
            ) from None


def as_tuple(array: HostArray) -> tuple[int, tuple[int, ...], tuple[int, ...], str]:
    """What the bindings read of a HostArray."""
    return array.address, array.shape, array.strides, array.dtype
