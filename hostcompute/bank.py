"""ExpertBank: one layer's experts in host memory, and the arithmetic next to them."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hostcompute.arrays import FLOATS, IDS, HostArray, as_host_array, empty_like, row_major
from hostcompute.backends.base import Backend, ExpertWeights, Pending
from hostcompute.backends.select import BackendChoice, choose
from hostcompute.layout import LANES, PAD_K, make_layout
from hostcompute.places import NOWHERE, HostPlaces
from hostcompute.spec import Cut, ExpertSpec, RoutedCounts
from hostcompute.topology import machine_memory_bytes


class ExpertBank:
    """One layer's experts; computes the routed pairs it is asked for.

    spec: shape and arithmetic. backend: "auto" (native, else numba), "native", "numba" or "reference".
    pool: from `make_pool` (default: the process's own). isa: force one instruction set of the native backend.
    places: memory that banks share, native ones alone; `place` says which expert lies where, at first none does.
    `bank.choice` says which backend and ISA run and why.

        bank = ExpertBank(ExpertSpec(num_experts=8, d_model=64, d_ffn=128))
        bank.load(0, gate=gate_FD, up=up_FD, down=down_DF)
        y_TD = bank.forward(x_TD, topk_ids_TK, topk_weights_TK)

    Arrays are NumPy, torch (CPU) or DLPack; x, out, routing weights and experts are float32, bfloat16 or float16, ids
    int32 or int64. Experts are rounded to spec.dtype where theirs is wider.
    Pairs with weight 0 or an id outside [0, E), negative ones included, are ignored and contribute zero: so routers
    mark pairs that somebody else computes. A wrong id is therefore no error.
    Errors: ValueError for shapes and types, and for a bank larger than the machine's memory; KeyError for an expert
    that was never loaded; RuntimeError after close() or when a pending forward is waited for in a forked child.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        backend: str = "auto",
        pool: Any = None,
        isa: str | None = None,
        places: HostPlaces | None = None,
    ) -> None:
        _check_kinds(spec, pool, places)
        self.spec = spec
        self.choice: BackendChoice = choose(backend, isa)
        if places is None:
            _check_fits(spec)
        else:
            _check_places(spec, places, self.choice)
        self._backend = self.choice.build(spec, pool, places)
        self._places = places
        num_experts = spec.num_experts
        self._place_of_expert_E = list(range(num_experts)) if places is None else [NOWHERE] * num_experts
        self._loaded: set[int] = set()
        self._closed = False
        self.last_counts: RoutedCounts | None = None  # what the latest `forward` did

    # ---- weights ----
    def load(
        self,
        expert_id: int,
        *,
        up: Any,
        down: Any,
        gate: Any = None,
        up_bias: Any = None,
        down_bias: Any = None,
        gate_bias: Any = None,
    ) -> None:
        """Take one expert: gate_FD, up_FD, down_DF and biases gate_F, up_F, down_D. Replaces an earlier one.

        Any strides will do, so interleaved and transposed checkpoints are views. Not concurrent with forward.
        The native backend packs a copy; numba refers to matrices that have the bank's type and rows of unit
        stride, so those must not change afterwards. An expert without a place is checked and its biases are kept.

        Errors: ValueError on shapes, on biases in a bank without them, and on NaN or infinite weights.
        """
        self._check_open("load")
        self._check_id(expert_id, "load")
        D, F = self.spec.d_model, self.spec.d_ffn
        if (gate is not None) != self.spec.gated:
            wanted = "an array" if self.spec.gated else "None"
            raise ValueError(f"[load] gate: expected {wanted} as spec.gated={self.spec.gated}")
        shapes = {
            "gate": (F, D),
            "up": (F, D),
            "down": (D, F),
            "gate_bias": (F,),
            "up_bias": (F,),
            "down_bias": (D,),
        }
        given = {
            "gate": gate,
            "up": up,
            "down": down,
            "gate_bias": gate_bias,
            "up_bias": up_bias,
            "down_bias": down_bias,
        }
        arrays: dict[str, Any] = {}
        for name, value in given.items():
            if value is None:
                continue
            array = as_host_array(value, f"[load] {name}")
            if array.shape != shapes[name]:
                raise ValueError(f"[load] {name}: expected shape {shapes[name]}, got {array.shape}")
            if name.endswith("_bias") and not self.spec.has_bias:
                raise ValueError(
                    f"[load] {name}: this bank keeps no biases; build it with ExpertSpec(has_bias=True)"
                )
            arrays[name] = array
        self._backend.load(expert_id, ExpertWeights(**arrays))
        if self._place_of_expert_E[expert_id] != NOWHERE:
            self._loaded.add(expert_id)

    def export(self, expert_id: int) -> ExpertWeights:
        """A row-major copy of one expert, in the bank's storage type; what `load` took, bit for bit."""
        self._check_open("export")
        self._check_id(expert_id, "export")
        self._check_loaded({expert_id}, "export")
        return self._backend.export(expert_id)

    def release(self, expert_id: int) -> None:
        """Forget one expert and give its memory back. Not concurrent with forward."""
        self._check_open("release")
        self._check_id(expert_id, "release")
        self._loaded.discard(expert_id)
        if self._places is not None:
            self._place_of_expert_E[expert_id] = NOWHERE
        self._backend.release(expert_id)

    def place(self, expert_id: int, place: int, is_filled: bool = False) -> None:
        """In shared memory the expert lies in this place from now on, or nowhere (NOWHERE); its biases stay.

        is_filled: its panels are there already; else `load` puts them there. Other experts may be computed meanwhile.
        Errors: ValueError for a place that is not there and for a bank with places of its own.
        """
        self._check_open("place")
        self._check_id(expert_id, "place")
        if self._places is None:
            raise ValueError(
                "[place] this bank has places of its own; build it with ExpertBank(places=HostPlaces(...))"
            )
        if not NOWHERE <= place < self._places.num_places:
            raise ValueError(f"[place] place: expected -1..{self._places.num_places - 1}, got {place}")
        backend: Any = self._backend
        backend.native_bank.place(expert_id, place, is_filled)
        self._place_of_expert_E[expert_id] = place
        if is_filled and place != NOWHERE:
            self._loaded.add(expert_id)
        else:
            self._loaded.discard(expert_id)

    # ---- compute ----
    def forward(self, x_TD: Any, topk_ids_TK: Any, topk_weights_TK: Any, out: Any = None) -> Any:
        """y_TD = sum over k of weight_Tk * expert[id_Tk](x_T), in fp32, rounded once to out's type.

        `out` is by default a new array like x. Pairs of weight 0, or with an id outside [0, E), add nothing: routers
        mark so what others compute.
        """
        arrays, out = self._check_batch(x_TD, topk_ids_TK, topk_weights_TK, out)
        self.last_counts = self._backend.forward(*arrays)
        return out

    def submit(
        self,
        x_TD: Any,
        topk_ids_TK: Any,
        topk_weights_TK: Any,
        out: Any = None,
        cut: Cut | None = None,
        experts_E: NDArray[np.bool_] | None = None,
        adds: bool = False,
    ) -> PendingForward:
        """Start a forward and return at once; the arrays must not change until `wait`. Several are done in their order.

        cut: only a part of this expert. experts_E: whose pairs count, bool, by default everybody's. adds: to what out
        holds, float32, which an earlier one may still be writing. Errors: ValueError for any of these of another backend
        than native, and for wrong ones.
        """
        if adds and out is None:
            raise ValueError("[submit] adds: expected an out to add to; give the array of the submit before")
        arrays, out = self._check_batch(x_TD, topk_ids_TK, topk_weights_TK, out)
        if cut is None and experts_E is None and not adds:
            return PendingForward(self._backend.submit(*arrays), out, arrays)
        chosen_E = None if experts_E is None else np.asarray(experts_E)
        return PendingForward(self._submit_part(arrays, cut, chosen_E, adds), out, (*arrays, chosen_E))

    def _submit_part(
        self, arrays: tuple[HostArray, ...], cut: Cut | None, chosen_E: NDArray[Any] | None, adds: bool
    ) -> Pending:
        if self.choice.name != "native":
            raise ValueError(
                "[submit] cut, experts_E and adds: only the native backend computes parts of a forward, this is "
                f"{self.choice.name}"
            )
        if cut is not None and (not 0 < cut.first_row < self.spec.d_ffn or cut.first_row % PAD_K):
            raise ValueError(
                f"[submit] cut: expected a multiple of {PAD_K} in 1..{self.spec.d_ffn - 1}, got {cut.first_row}"
            )
        E = self.spec.num_experts
        if chosen_E is not None and not (
            chosen_E.dtype == np.bool_ and chosen_E.shape == (E,) and chosen_E.flags.c_contiguous
        ):
            raise ValueError(
                f"[submit] experts_E: expected ({E},) bools in a row, got {chosen_E.shape} of {chosen_E.dtype}"
            )
        if adds and arrays[3].dtype != "f32":
            raise ValueError(f"[submit] adds: expected an out of float32, got {arrays[3].dtype}")
        backend: Any = self._backend
        at = (-1, 0) if cut is None else (cut.expert_id, cut.first_row // LANES)
        pending: Pending = backend.submit(*arrays, *at, chosen_E, adds)
        return pending

    # ---- life ----
    @property
    def backend(self) -> Backend:
        """What does the work, for those who know more than one of its kind."""
        return self._backend

    @property
    def loaded_experts(self) -> frozenset[int]:
        return frozenset(self._loaded)

    @property
    def place_of_expert_E(self) -> Sequence[int]:
        """Where experts lie, in units of blob_bytes from the beginning of the memory; follows what `place` changes."""
        return self._place_of_expert_E

    @property
    def resident_bytes(self) -> int:
        """Host bytes held for weights, padding included."""
        return 0 if self._closed else self._backend.resident_bytes

    def close(self) -> None:
        """Give the memory back. Any later use raises RuntimeError; closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._loaded.clear()
            self._backend.close()

    def __enter__(self) -> ExpertBank:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an ExpertBank can be neither copied nor pickled; load what export(expert_id) gives into a new one"
        )

    # ---- checks ----
    def _check_open(self, op: str) -> None:
        if self._closed:
            raise RuntimeError(
                f"[{op}] this ExpertBank was closed and its experts are gone; build a new one and load them"
            )

    def _check_id(self, expert_id: Any, op: str) -> None:
        if not isinstance(expert_id, Integral) or not 0 <= int(expert_id) < self.spec.num_experts:
            raise ValueError(f"[{op}] expert_id: expected 0..{self.spec.num_experts - 1}, got {expert_id!r}")

    def _check_loaded(self, expert_ids: set[int], op: str) -> None:
        missing = sorted(expert_ids - self._loaded)
        if missing:
            raise KeyError(f"[{op}] experts {missing} were never loaded into this bank; call load() first")

    def _check_batch(self, x: Any, ids: Any, weights: Any, out: Any) -> tuple[tuple[HostArray, ...], Any]:
        self._check_open("forward")
        if out is None:
            out = empty_like(x, "[forward] out")
        arrays = tuple(
            as_host_array(value, f"[forward] {name}", types)
            for name, value, types in (
                ("x", x, FLOATS),
                ("topk_ids", ids, IDS),
                ("topk_weights", weights, FLOATS),
                ("out", out, FLOATS),
            )
        )
        x_a, ids_a, weights_a, out_a = arrays
        if len(x_a.shape) != 2 or x_a.shape[1] != self.spec.d_model:
            raise ValueError(f"[forward] x: expected shape (T, {self.spec.d_model}), got {x_a.shape}")
        if len(ids_a.shape) != 2 or ids_a.shape[0] != x_a.shape[0]:
            raise ValueError(f"[forward] topk_ids: expected shape ({x_a.shape[0]}, K), got {ids_a.shape}")
        if weights_a.shape != ids_a.shape:
            raise ValueError(f"[forward] topk_weights: expected shape {ids_a.shape}, got {weights_a.shape}")
        if out_a.shape != x_a.shape:
            raise ValueError(f"[forward] out: expected shape {x_a.shape}, got {out_a.shape}")
        if not out_a.has_unit_stride_rows or out_a.has_overlapping_rows:
            raise ValueError(
                f"[forward] out: expected rows of unit stride that do not overlap, got strides {out_a.strides}; "
                "make it contiguous"
            )
        if isinstance(out, np.ndarray) and not out.flags.writeable:
            raise ValueError("[forward] out: expected an array to write to, got a read-only one; copy it")
        return (row_major(x_a, x_a.dtype), ids_a, weights_a, out_a), out


def _check_kinds(spec: Any, pool: Any, places: Any) -> None:
    """What duck typing would report deep inside a backend."""
    if not isinstance(spec, ExpertSpec):
        raise TypeError(f"ExpertBank: spec: expected an ExpertSpec, got {type(spec).__name__}")
    if pool is not None and not hasattr(pool, "num_threads"):
        raise TypeError(
            f"ExpertBank: pool: expected one from make_pool(num_threads), got {type(pool).__name__}"
        )
    if places is not None and not isinstance(places, HostPlaces):
        raise TypeError(f"ExpertBank: places: expected HostPlaces, got {type(places).__name__}")


def _check_fits(spec: ExpertSpec) -> None:
    """Memory is reserved at once and taken by `load`, so that without this a bank too large would die while loading."""
    bank_bytes, have_bytes = spec.num_experts * make_layout(spec).blob_bytes, machine_memory_bytes()
    if bank_bytes > have_bytes:
        raise ValueError(
            f"ExpertBank: {spec.num_experts} experts of D={spec.d_model}, F={spec.d_ffn} in {spec.dtype.value} take "
            f"{bank_bytes / 2**30:.3g} GiB, this machine has {have_bytes / 2**30:.3g} GiB; use fewer or smaller experts"
        )


def _check_places(spec: ExpertSpec, places: HostPlaces, choice: BackendChoice) -> None:
    if choice.name != "native":
        raise ValueError(
            f'ExpertBank: places need the native backend, this is {choice.name}; use backend="native", or no places'
        )
    wanted_bytes = make_layout(spec).blob_bytes
    if places.blob_bytes != wanted_bytes:
        raise ValueError(
            f"ExpertBank: places: expected {wanted_bytes} bytes each, got {places.blob_bytes}; "
            "make them with HostPlaces(make_layout(spec), ...)"
        )


class PendingForward:
    """A forward under way; keeps its arrays alive until it is done.

    One that is dropped, or still under way when the interpreter leaves, is waited for, because it writes to
    `out`; what it raised is lost with it.
    """

    def __init__(self, pending: Pending, out: Any, keep_alive: tuple[object, ...]) -> None:
        self._pending, self._out, self._keep_alive = pending, out, keep_alive
        self._pid = os.getpid()
        self.counts: RoutedCounts | None = None
        _under_way.add(self)

    def done(self) -> bool:
        return self._pending.done()

    def wait_for(self, seconds_s: float) -> bool:
        """Whether it was done in time; `wait` has the result, or what was raised."""
        return self._pending.wait_for(seconds_s)

    @property
    def busy_s(self) -> float:
        """What the forward took by itself, once done."""
        return self._pending.busy_s

    def wait(self) -> Any:
        """Block until the result is there and return it."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "[wait] this forward was submitted before a fork; only the parent can wait for it"
            )
        self.counts = self._pending.wait()
        return self._out

    def finish(self) -> None:
        """Wait without the result: for a forward that nobody asks for any more."""
        with contextlib.suppress(Exception):
            self.wait()

    def __del__(self) -> None:
        self.finish()


_under_way: weakref.WeakSet[PendingForward] = weakref.WeakSet()


@atexit.register
def _finish_all() -> None:
    for pending in list(_under_way):
        pending.finish()
