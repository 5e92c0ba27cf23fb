"""`monde bench --trace out.json`: a prompt and a few decode steps as a Chrome trace, for ui.perfetto.dev.

    GPU             kernels and copies by stream, from CUPTI; the kernels of decode carry their layer
    GPU layers      from a decode layer's first kernel to its last
    Python          operators, and a span per layer that Python calls (a replayed graph has none)
    host experts    forwards by layer, and below what each thread of the pool did

Times come from one clock: torch's profiler gives Unix nanoseconds, the host's are shifted to them. The file counts
microseconds from the start of the recording: since 1970 they would not fit a double to a nanosecond.
"""

from __future__ import annotations

import bisect
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hostcompute.timeline import HostSpan, HostTimeline, bank_id
from monde.cli.decoder import decoder_of
from monde.cli.records import BenchTest
from monde.cli.runners import Runner
from monde.cli.texts import TokenSource
from monde.models.decode_graph import step_cache

NUM_TRACED_STEPS = 8
NUM_WARM_UPS = 24  # by then a decode step has been captured
_STDERR = 2
_HOST_PID, _LAYERS_PID = 1 << 30, (1 << 30) + 1  # no process has these
_DECODE_KERNELS = ("route", "gate_up", "down", "combine", "collect")

Event = dict[str, Any]


def check_trace(path: Path) -> None:
    """Errors: ValueError, before anything is loaded, when `path` cannot be a trace."""
    if path.suffix != ".json":
        raise ValueError(f"--trace {path}: expected a file that ends in .json")
    if not path.parent.is_dir():
        raise ValueError(f"--trace {path}: the folder {path.parent} does not exist; make it first")


@torch.inference_mode()
def trace(runner: Runner, tests: list[BenchTest], source: TokenSource, path: Path) -> None:
    """Record every test once, after warming up, and write the trace. Errors: ValueError without the native backend."""
    engine: Any = runner.model.monde
    layer_of = {bank_id(layer.host.bank): layer_idx for layer_idx, layer in enumerate(engine.layers)}
    events: list[Event] = _names(_HOST_PID, "host experts", {0: "layers"})
    origin_ns = time.time_ns()
    for test in tests:
        recording = Recording(engine.layers, str(runner.model.device.type))
        _run(runner, test, source.window(0, test.batch, test.num_positions + 1), recording)
        events += device_events(_exported(recording.profiler, origin_ns), len(engine.layers))
        events += host_events(recording.host.spans, layer_of, recording.shift_ns - origin_ns)
    path.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}))


def _run(runner: Runner, test: BenchTest, tokens: torch.Tensor, recording: Recording) -> None:
    runner.activate()
    tokens = tokens.to(runner.model.device)
    if test.num_prompt:  # once before, so that nothing is compiled or allocated under the eyes
        decoder_of(runner.model).read(tokens[:, : test.depth + test.num_prompt])
    with step_cache(runner.model, test.batch, test.num_positions) as cache:
        decoder = decoder_of(runner.model, cache)
        depth = max(test.depth, decoder.least_depth) if test.num_generated else test.depth
        if depth:
            decoder.read(tokens[:, :depth])
        if test.num_prompt:
            with recording.on():
                decoder.read(tokens[:, depth : depth + test.num_prompt])
            return
        num_traced = min(NUM_TRACED_STEPS, test.num_generated)
        first = depth + min(NUM_WARM_UPS, test.num_generated - num_traced)
        for position in range(depth, first):
            decoder.step(tokens[:, position : position + 1])
        with recording.on():
            for position in range(first, first + num_traced):
                with torch.profiler.record_function(f"decode step {position}"):
                    decoder.step(tokens[:, position : position + 1])


@dataclass
class Recording:
    """What torch and the host's threads saw between `on` and its end."""

    layers: list[Any]
    device_type: str
    host: HostTimeline = field(default_factory=HostTimeline)
    profiler: Any = None
    shift_ns: int = 0  # from the host's clock to the time since 1970

    @contextmanager
    def on(self) -> Iterator[None]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device_type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)
        with ExitStack() as stack:
            for layer_idx, layer in enumerate(self.layers):
                stack.enter_context(_named(layer, f"layer {layer_idx}"))
            with without_probe_lines():
                self.profiler.start()
            try:
                with self.host:
                    yield
                    if self.device_type == "cuda":
                        torch.cuda.synchronize()
            finally:
                with without_probe_lines():
                    self.profiler.stop()
        self.shift_ns = time.time_ns() - time.monotonic_ns()


@contextmanager
def without_probe_lines() -> Iterator[None]:
    """Keeps from standard error what the profiler prints for those who probe it; all else comes through at the end.

    KINETO_LOG_LEVEL is no way: the levels that are silent about probes are silent about errors.
    """
    if sys.stderr is None:  # closed
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(_STDERR)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), _STDERR)
        try:
            yield
        finally:
            os.dup2(stderr, _STDERR)
            os.close(stderr)
            printed.seek(0)
            os.write(_STDERR, b"".join(line for line in printed if not line.startswith(b"USDT:")))


@contextmanager
def _named(layer: Any, name: str) -> Iterator[None]:
    """The layer's calls from Python as spans."""
    forward = layer.forward

    def traced(*args: Any) -> Any:
        with torch.profiler.record_function(name):
            return forward(*args)

    layer.forward = traced
    try:
        yield
    finally:
        del layer.forward


def _exported(profiler: Any, origin_ns: int) -> list[Event]:
    """torch's own trace, its times as microseconds since `origin_ns`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "torch.json"
        profiler.export_chrome_trace(str(path))
        exported = json.loads(path.read_text())
    base_us = (exported.get("baseTimeNanoseconds", 0) - origin_ns) * 1e-3
    events: list[Event] = [event for event in exported["traceEvents"] if event.get("name") != "Trace"]
    for event in events:
        if "ts" in event and event["ph"] != "M":
            event["ts"] += base_us
    return events


def device_events(events: list[Event], num_layers: int) -> list[Event]:
    """The same with layers: the decode kernels of a stream run layer by layer, and `route` begins one."""
    kernels = sorted(
        (event for event in events if event.get("cat") == "kernel" and event.get("name") in _DECODE_KERNELS),
        key=lambda event: event["ts"],
    )
    spans: list[Event] = []
    num_begun = 0
    for event in kernels:
        if event["name"] == "route":
            num_begun += 1
            spans.append({**event, "pid": _LAYERS_PID, "tid": 0, "cat": "layer", "args": {}})
        if not spans:
            continue
        layer_idx = (num_begun - 1) % num_layers
        event.setdefault("args", {})["layer"] = layer_idx
        spans[-1] |= {"name": f"layer {layer_idx}", "dur": event["ts"] + event["dur"] - spans[-1]["ts"]}
    return [*events, *(_names(_LAYERS_PID, "GPU layers", {0: "decode"}) if spans else []), *spans]


def host_events(spans: list[HostSpan], layer_of: dict[int, int], shift_ns: int) -> list[Event]:
    """Forwards in the first row, threads below. A phase belongs to the forward around it."""
    forwards = [span for span in spans if span.thread < 0]
    starts_ns = [span.start_ns for span in forwards]
    events = _names(
        _HOST_PID, "host experts", {s.thread + 1: f"thread {s.thread}" for s in spans if s.thread >= 0}
    )
    for span in spans:
        place = bisect.bisect_right(starts_ns, span.start_ns) - 1
        around = forwards[place] if place >= 0 and forwards[place].end_ns >= span.end_ns else None
        layer_idx = None if around is None else layer_of.get(around.bank)
        args: dict[str, Any] = {"layer": layer_idx}
        if span.thread < 0:
            args |= {"tokens": span.num_tokens, "pairs": span.num_pairs, "weight_bytes": span.weight_bytes}
            args["GB_per_s"] = span.weight_bytes / max(span.end_ns - span.start_ns, 1)
        else:
            args["units"] = span.num_units
        where = "" if layer_idx is None else f"layer {layer_idx}"
        name = where or span.name if span.thread < 0 else f"{where} {span.name}".strip()
        events.append(
            {
                "ph": "X",
                "cat": "host",
                "name": name,
                "pid": _HOST_PID,
                "tid": span.thread + 1,
                "ts": (span.start_ns + shift_ns) * 1e-3,
                "dur": (span.end_ns - span.start_ns) * 1e-3,
                "args": args,
            }
        )
    return events


def _names(pid: int, process: str, threads: dict[int, str]) -> list[Event]:
    """Metadata: what the rows are called, and their order."""
    events: list[Event] = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": process}}
    ]
    for tid, name in sorted(threads.items()):
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}})
        events.append(
            {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
        )
    return events
