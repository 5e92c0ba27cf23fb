"""A plan as JSON and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monde.cli.plan_forecast import Forecast, FormatVerdict, Question
from monde.models.outline import Outlined
from monde.planning.budget import fits_shorter
from monde.planning.forecast import Speed
from monde.planning.formats import WeightFormat
from monde.planning.played import Played
from monde.sizes import format_bytes as size
from monde.sizes import format_number as number

THIS_MACHINE = "this machine, calibrated"


def answer_of(
    profile_is: str,
    question: Question,
    asked: WeightFormat,
    verdicts: Sequence[FormatVerdict],
    outlined: Outlined,
    more_gpu: Forecast | None = None,
    more_host: Forecast | None = None,
) -> dict[str, Any]:
    """more_gpu, more_host: forecasts with one more GiB, and with one more memory channel."""
    profile, best = question.profile, question.best(verdicts)
    mine = next(verdict for verdict in verdicts if verdict.format is asked)
    answer = {
        "profile": profile_is,
        "machine": profile.machine.name,
        "source": profile.source,
        "noisy": [str(noise) for noise in profile.noisy],
        "memory_channels": None if profile.memory_channels is None else asdict(profile.memory_channels),
        "checkpoint": None if outlined.stored is None else asdict(outlined.stored),
        "index": None
        if outlined.index is None
        else {"num_files": outlined.index.num_files, "total_bytes": outlined.index.total_bytes},
        "context": question.context,
        "batch": question.batch,
        "prompt": question.prompt,
        "format": asked.name,
        "stored_format": question.stored_format.name,
        "best_format": None if best is None else best.name,
        "formats": [_verdict(verdict) for verdict in verdicts],
        **_verdict(mine),
    }
    now = mine.forecast
    if now is None:
        return answer
    return answer | {
        "num_resident": sum(now.plan.num_resident_L),
        "num_experts": sum(layer.num_experts for layer in now.plan.size.layers),
        "num_released": now.plan.num_released,
        "saved_host_bytes": now.plan.saved_bytes,
        "dense_bytes": now.plan.size.dense_bytes,
        "expert_bytes": now.plan.size.expert_bytes,
        "gpu_used_bytes": now.plan.gpu_used_bytes,
        "gpu_bytes": now.plan.gpu_bytes,
        "host_used_bytes": now.plan.host_used_bytes,
        "host_bytes": now.plan.host_bytes,
        **{
            name: _speed(
                getattr(now, name),
                None if more_gpu is None else getattr(more_gpu, name),
                None if more_host is None else getattr(more_host, name),
            )
            for name in ("decode", "prefill")
        },
    }


def trace_answer(played: Played) -> dict[str, Any]:
    """Of the steps of a recorded routing."""
    if not played.step_s:
        raise ValueError("--routing: it holds no steps; record a longer one")
    total_s = sum(played.step_s)
    return {
        "num_steps": len(played.step_s),
        "steps_per_s": len(played.step_s) / total_s,
        "slowest_step_s": max(played.step_s),
        "busy_share": {resource.value: busy_s / total_s for resource, busy_s in played.busy_s.items()},
    }


def _verdict(verdict: FormatVerdict) -> dict[str, Any]:
    """spare: what the budgets hold beyond the plan; short: what they lack."""
    now, error = verdict.forecast, verdict.error
    return {
        "format": verdict.format.name,
        "fits": now is not None,
        "why_not": None if error is None else error.why,
        "short_bytes": None if error is None else error.short_bytes,
        "smallest_gpu_bytes": verdict.smallest_gpu_bytes,
        "spare_gpu_bytes": None if now is None else max(0, now.plan.gpu_bytes - now.plan.gpu_used_bytes),
        "spare_host_bytes": None if now is None else now.plan.host_bytes - now.plan.host_used_bytes,
        "decode_tokens_per_s": None if now is None else now.decode.tokens_per_s,
        "prefill_tokens_per_s": None if now is None else now.prefill.tokens_per_s,
    }


def _speed(now: Speed, more_gpu: Speed | None, more_host: Speed | None) -> dict[str, Any]:
    return {
        "tokens_per_s": now.tokens_per_s,
        "step_s": now.step_s,
        "limit": now.limit,
        "gain_of_10_percent_more": now.gain,
        "gain_of_one_more_gib_of_gpu_memory": None if more_gpu is None else now.step_s / more_gpu.step_s,
        "gain_of_one_more_memory_channel": None if more_host is None else now.step_s / more_host.step_s,
    }


def text_of(now: Forecast, answer: dict[str, Any], heat: Path | None) -> str:
    lines = [f"profile of {answer['profile']}: {answer['machine']} ({answer['source']})"]
    if answer["noisy"]:
        lines.append(
            f"measured while the machine was noisy: {len(answer['noisy'])} figures in doubt; "
            "run `monde calibrate --force` when it is idle"
        )
    lines += [
        _checkpoint_text(answer["checkpoint"], answer["index"]),
        now.plan.explain(),
        _spare_text(answer),
    ]
    lines += [_speed_text(name, answer[name]) for name in ("decode", "prefill")]
    if answer["memory_channels"] is None and answer["profile"] == THIS_MACHINE:
        lines.append(
            "what one more memory channel would buy is not known, for no measurement tells how many there are: "
            "`monde calibrate --force --memory-channels 12x38.4`, with this machine's"
        )
    if "routing" in answer:
        lines.append(_trace_text(answer["routing"]))
    lines.append(f"formats: {'; '.join(map(_format_text, answer['formats']))}")
    lines.append(_best_text(answer))
    lines.append(
        "Speeds are for equally popular experts; routing that is skewed makes slots worth more."
        if heat is None
        else f"Speeds are for experts as popular as in {heat}."
    )
    return "\n".join(lines)


def impossible(
    mine: FormatVerdict, question: Question, verdicts: Sequence[FormatVerdict], card_bytes: int
) -> str:
    """One line: why it does not fit, the smallest budget that does, and the formats that fit this one."""
    assert mine.error is not None
    smallest, profile = mine.smallest_gpu_bytes, question.profile
    less = ", lower --context or --batch" if mine.error.shorter_fits else ""
    if not question.on_gpu:
        enough = mine.error.smallest_bytes <= profile.memory_bytes
        more = f"Give at least --host-memory {mine.error.smallest_bytes}" if enough else "Add host memory"
        remedy = f"{more}{less}, or use a smaller model."
    elif smallest is None or smallest > card_bytes:
        memory = question.outlined(mine.format).size
        # Shorter sequences leave the GPU room; experts that the host cannot hold they do not.
        if memory.dense_bytes + memory.library_bytes > card_bytes:
            more = "take a GPU with more memory"
        elif memory.dense_bytes + memory.kv_bytes + memory.workspace_bytes > card_bytes and fits_shorter(
            memory, True, card_bytes, question.host_bytes
        ):
            more = "lower --context or --batch"
        else:
            more = "raise --host-memory" if question.host_bytes < profile.memory_bytes else "add host memory"
        remedy = (
            f"No gpu_memory of {profile.machine.name} works in {mine.format.name} with this host_memory; "
            f"{more}, or use a smaller model."
        )
    else:
        remedy = f"Give at least --gpu-memory {smallest}{less}."
    best = question.best(verdicts)
    if best is not None and best is not mine.format:
        remedy += f" As it is, --format {best.name} fits."
    return f"{mine.error.why} {remedy}"


def _spare_text(answer: dict[str, Any]) -> str:
    return f"left over: {size(answer['spare_gpu_bytes'])} of gpu_memory, {size(answer['spare_host_bytes'])} of host_memory"


def _speed_text(name: str, s: dict[str, Any]) -> str:
    gains = [f"{r} {_percent(g)}" for r, g in s["gain_of_10_percent_more"].items()]
    text = (
        f"{name + ':':<8} about {number(s['tokens_per_s'])} tokens/s, limited by the {s['limit']}\n"
        f"         faster with a tenth more of: {', '.join(gains)}"
    )
    more = {
        "one more GiB of GPU memory": s["gain_of_one_more_gib_of_gpu_memory"],
        "one more memory channel": s["gain_of_one_more_memory_channel"],
    }
    known = [f"{what}: {_percent(g)}" for what, g in more.items() if g is not None]
    return f"{text}\n         {', '.join(known)}" if known else text


def _trace_text(trace: dict[str, Any]) -> str:
    busy = ", ".join(f"{resource} {share:.0%}" for resource, share in trace["busy_share"].items())
    return (
        f"recorded routing: {trace['num_steps']} steps, {number(trace['steps_per_s'])} a second; busy: {busy}"
    )


def _format_text(verdict: dict[str, Any]) -> str:
    if not verdict["fits"]:
        return f"{verdict['format']} short by {size(verdict['short_bytes'])}"
    return (
        f"{verdict['format']} {number(verdict['decode_tokens_per_s'])} tokens/s decoding, "
        f"{number(verdict['prefill_tokens_per_s'])} prefilling"
    )


def _best_text(answer: dict[str, Any]) -> str:
    best, stored = answer["best_format"], answer["stored_format"]
    if best is None:
        return f"the checkpoint is in {stored}: no format of as few bits fits"
    why = "the checkpoint's own" if best == stored else f"the checkpoint's {stored} does not"
    return f"best format that fits: {best} ({why})"


def _checkpoint_text(stored: dict[str, int] | None, index: dict[str, int | None] | None) -> str:
    if index is not None:
        total_bytes = index["total_bytes"]
        told = "" if total_bytes is None else f"{size(total_bytes)} in "
        return f"the checkpoint's index names all experts, {told}{index['num_files']} files that are not here"
    if stored is None:
        return "no checkpoint here: sizes from the configuration"
    unused = f", {size(stored['unused_bytes'])} not loaded" if stored["unused_bytes"] else ""
    return (
        f"checkpoint: {size(stored['dense_bytes'])} dense, {size(stored['expert_bytes'])} of experts{unused} "
        f"in {stored['num_files']} file{'s' if stored['num_files'] > 1 else ''}"
    )


def _percent(gain: float) -> str:
    return f"{100 * (gain - 1):.1f}%"
