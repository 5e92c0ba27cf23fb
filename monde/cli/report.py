"""Results as text: md for people, csv, json and jsonl for programs. One flat record a test and runner.

Field names are llama-bench's where they mean the same, so its scripts read ours; the others carry their unit.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable
from typing import Any

from monde.cli.options import OutputFormat
from monde.cli.records import BenchReport, TestResult

GIB = 2**30


def render(report: BenchReport, output: OutputFormat) -> str:
    """The whole report in one of the formats."""
    if output is OutputFormat.MD:
        return _markdown(report)
    records = [flat_record(report, result) for result in report.results]
    if output is OutputFormat.JSON:
        return json.dumps(records, indent=2)
    if output is OutputFormat.JSONL:
        return "\n".join(json.dumps(record) for record in records)
    return _csv(records)


def flat_record(report: BenchReport, result: TestResult) -> dict[str, Any]:
    """One result and all it takes to repeat it: configuration, commit, machine, versions, raw samples."""
    runner, test, model, machine = result.runner, result.test, report.model, report.machine
    measured: dict[str, Any] = {}
    if not result.skipped:
        durations_s = [sample.duration_s for sample in result.samples]
        spread_s = statistics.stdev(durations_s) if len(durations_s) > 1 else 0.0
        measured = {
            "avg_ns": round(result.mean_duration_s * 1e9),
            "stddev_ns": round(spread_s * 1e9),
            "avg_ts": result.tokens_per_s,
            "stddev_ts": result.tokens_per_s_std,
            "ttft_s": result.ttft_s,
            "tpot_s": result.tpot_s,
            "speedup_over_best_baseline": report.speedup(result),
            "agreement": result.agreement,
            "resident_share": result.resident_share,
            "swaps_per_token": result.per_token("num_swaps"),
            "swap_bytes_per_token": result.per_token("swap_bytes"),
            "h2d_bytes_per_token": result.per_token("h2d_bytes"),
            "d2h_bytes_per_token": result.per_token("d2h_bytes"),
            "host_weight_bytes_per_token": result.per_token("host_weight_bytes"),
            "host_bytes_per_s": result.host_bytes_per_s,
            "host_share_of_read_ceiling": report.host_share_of_ceiling(result),
            "peak_host_bytes": result.peak_host_bytes,
            "peak_gpu_bytes": result.peak_gpu_bytes,
            "samples_ns": [round(s * 1e9) for s in durations_s],
            "samples_ts": [test.num_tokens * runner.num_ranks / s for s in durations_s],
        }
    return {
        "build_commit": machine.commit,
        "cpu_info": machine.cpu,
        "gpu_info": machine.gpu,
        "num_cores": machine.num_cores,
        "memory_bytes": machine.memory_bytes,
        "python": machine.python,
        "versions": machine.versions,
        "command": report.command,
        "test_time": report.started,
        "model_filename": model.name,
        "model_type": model.model_type,
        "model_size": model.weight_bytes,
        "model_n_params": model.num_params,
        "dtype": model.dtype,
        "text": report.text,
        "read_ceiling_bytes_per_s": report.read_ceiling_bytes_per_s,
        "runner": runner.label,
        "backends": runner.backend,
        "device": runner.device,
        "n_threads": runner.num_threads,
        "n_ranks": runner.num_ranks,
        "load_s": runner.loading.duration_s,
        "test": test.name,
        "n_prompt": test.num_prompt,
        "n_gen": test.num_generated,
        "n_depth": test.depth,
        "n_seqs": test.batch,
        "skipped": result.skipped,
        **measured,
    }


def _csv(records: list[dict[str, Any]]) -> str:
    """Lists and dictionaries become JSON in a cell; a skipped test leaves its figures empty."""
    columns = list(dict.fromkeys(column for record in records for column in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in record.items()})
    return text.getvalue().rstrip("\n")


# ---- markdown ----
Cell = Callable[[BenchReport, TestResult], str]

# Heading -> cell. Right-aligned from "batch" on; a column in which every cell is empty is left out.
_COLUMNS: dict[str, Cell] = {
    "model": lambda report, r: report.model.name,
    "size": lambda report, r: f"{report.model.weight_bytes / GIB:.2f} GiB",
    "params": lambda report, r: _count(report.model.num_params),
    "dtype": lambda report, r: report.model.dtype,
    "runner": lambda report, r: r.runner.label,
    "experts by": lambda report, r: r.runner.backend,
    "batch": lambda report, r: _batch(r),
    "test": lambda report, r: r.test.name,
    "t/s": lambda report, r: f"{r.tokens_per_s:.2f} ± {r.tokens_per_s_std:.2f}",
    "vs best baseline": lambda report, r: _format(report.speedup(r), "{:.2f}x"),
    "TTFT ms": lambda report, r: _format(r.ttft_s, "{:.1f}", 1e3),
    "TPOT ms": lambda report, r: _format(r.tpot_s, "{:.2f}", 1e3),
    "same tokens": lambda report, r: _format(r.agreement, "{:.0f}%", 100),
    "resident": lambda report, r: _format(r.resident_share, "{:.0f}%", 100),
    "swap MB/token": lambda report, r: _format(r.per_token("swap_bytes") or None, "{:.2f}", 1e-6),
    "host MB/token": lambda report, r: _format(r.per_token("host_weight_bytes"), "{:.2f}", 1e-6),
    "h2d+d2h KB/token": lambda report, r: _format(_link_bytes_per_token(r), "{:.1f}", 1e-3),
    "host GB/s": lambda report, r: _format(r.host_bytes_per_s, "{:.1f}", 1e-9),
    "of ceiling": lambda report, r: _format(report.host_share_of_ceiling(r), "{:.0f}%", 100),
    "peak host GiB": lambda report, r: f"{r.peak_host_bytes / GIB:.2f}",
    "peak GPU GiB": lambda report, r: f"{r.peak_gpu_bytes / GIB:.2f}" if r.peak_gpu_bytes else "",
}
_ALWAYS_KNOWN = ("model", "size", "params", "dtype", "runner", "experts by", "batch", "test")


def _markdown(report: BenchReport) -> str:
    rows = [_row(report, result) for result in report.results]
    headings = [heading for heading in _COLUMNS if any(row[heading] for row in rows)]
    widths = {h: max(len(h), 4, *(len(row[h]) for row in rows)) for h in headings}
    left = set(_ALWAYS_KNOWN[:1] + _ALWAYS_KNOWN[3:6])
    lines = [_line(headings, widths, {h: h for h in headings}, left)]
    lines.append(
        "| "
        + " | ".join("-" * widths[h] if h in left else "-" * (widths[h] - 1) + ":" for h in headings)
        + " |"
    )
    lines += [_line(headings, widths, row, left) for row in rows]
    return "\n".join([*lines, "", *_notes(report)])


def _row(report: BenchReport, result: TestResult) -> dict[str, str]:
    if not result.skipped:
        return {heading: cell(report, result) for heading, cell in _COLUMNS.items()}
    return {h: cell(report, result) if h in _ALWAYS_KNOWN else "" for h, cell in _COLUMNS.items()} | {
        "t/s": "skipped"
    }


def _line(headings: list[str], widths: dict[str, int], row: dict[str, str], left: set[str]) -> str:
    cells = (row[h].ljust(widths[h]) if h in left else row[h].rjust(widths[h]) for h in headings)
    return "| " + " | ".join(cells) + " |"


def _notes(report: BenchReport) -> list[str]:
    machine, versions = report.machine, report.machine.versions
    gpu = f", {machine.gpu}" if machine.gpu else ""
    ceiling = (
        _format(report.read_ceiling_bytes_per_s, "{:.1f} GB/s", 1e-9) or "unknown without the native module"
    )
    notes = [
        f"{machine.cpu}, {machine.num_cores} cores{gpu}; read ceiling {ceiling}; text: {report.text}",
        "  ".join(f"{name} {version}" for name, version in versions.items())
        + (f"  commit {machine.commit}" if machine.commit else ""),
        f"`{report.command}`",
    ]
    notes += [f"skipped: {r.test.name} by {r.runner.label} {r.skipped}" for r in report.results if r.skipped]
    return [f"{note}<br>" for note in notes[:-1]] + notes[-1:]


def _link_bytes_per_token(result: TestResult) -> float | None:
    h2d, d2h = result.per_token("h2d_bytes"), result.per_token("d2h_bytes")
    return None if not h2d and not d2h else (h2d or 0) + (d2h or 0)


def _format(value: float | None, pattern: str, scale: float = 1.0) -> str:
    return "" if value is None else pattern.format(value * scale)


def _batch(result: TestResult) -> str:
    ranks = f" on each of {result.runner.num_ranks} ranks" if result.runner.num_ranks > 1 else ""
    return f"{result.test.batch}{ranks}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
