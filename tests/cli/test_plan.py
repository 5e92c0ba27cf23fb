"""`monde plan`: the arithmetic, the forecast, and one line for what cannot be."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from monde import profile_store as store
from monde.cli.plan_forecast import Forecast
from monde.cli.plan_plot import sweep
from monde.models.outline import outline_of
from monde.planning.budget import LayerSize, ModelSize, plan_memory
from monde.planning.forecast import Speed
from monde.planning.machines import DESCRIBED
from monde.planning.network_profile import CLUSTERS
from monde.planning.profile import Noise
from monde.routing.heat import Heat
from monde.routing.trace import Trace
from monde.weights.checkpoint import read_header
from tests.cli.conftest import MODEL, Monde


def test_a_plan_needs_no_weights(monde: Monde, tmp_path: Path) -> None:
    shutil.copy(MODEL / "config.json", tmp_path)
    outcome = monde("plan", tmp_path, "--machine", "laptop-4060")
    assert outcome.exit_code == 0, outcome.stderr
    assert "64 of 64 experts" in outcome.stdout
    assert re.search(r"decode: +about [\d.,]+ tokens/s, limited by the launches", outcome.stdout)
    assert re.search(r"prefill: +about \d{1,3}(,\d{3})+ tokens/s", outcome.stdout)
    assert DESCRIBED["laptop-4060"].source in outcome.stdout
    assert "no checkpoint here: sizes from the configuration" in outcome.stdout


def smallest_budget(monde: Monde) -> int:
    """The bytes that the error of an impossible budget names."""
    outcome = monde("plan", MODEL, "-m", "h200", "--gpu-memory", "1MiB")
    assert outcome.exit_code == 2
    assert outcome.stderr.count("\n") == 1
    found = re.search(r"--gpu-memory (\d+)", outcome.stderr)
    assert found is not None
    return int(found.group(1))


def test_json_says_what_fits_and_what_more_would_buy(monde: Monde) -> None:
    smallest, speeds = smallest_budget(monde), []
    for more_mib in (0, 1, 2):
        budget = smallest + more_mib * 2**20
        outcome = monde("plan", MODEL, "-m", "h200", "--gpu-memory", budget, "--json")
        answer = json.loads(outcome.stdout)
        assert answer["gpu_used_bytes"] <= answer["gpu_bytes"] == budget
        assert answer["host_used_bytes"] <= answer["host_bytes"]
        assert answer["decode"]["gain_of_one_more_gib_of_gpu_memory"] >= 1
        assert set(answer["prefill"]["gain_of_10_percent_more"]) == {"host", "bus", "GPU", "launches"}
        assert answer["num_experts"] == 64
        speeds.append((answer["num_resident"], answer["decode"]["tokens_per_s"]))
    assert speeds == sorted(speeds)
    assert speeds[0][0] < speeds[-1][0]


def test_the_smallest_budget_that_an_error_names_works(monde: Monde) -> None:
    smallest = smallest_budget(monde)
    assert monde("plan", MODEL, "-m", "h200", "--gpu-memory", smallest).exit_code == 0
    assert monde("plan", MODEL, "-m", "h200", "--gpu-memory", smallest - 1).exit_code == 2


def test_an_impossible_budget_is_told_as_json_too(monde: Monde) -> None:
    outcome = monde("plan", MODEL, "-m", "h200", "--gpu-memory", "1MiB", "--json")
    assert outcome.exit_code == 2
    answer = json.loads(outcome.stdout)
    assert answer["fits"] is False
    assert answer["best_format"] is None
    assert answer["smallest_gpu_bytes"] == smallest_budget(monde) == 2**20 + answer["short_bytes"]
    assert "decode" not in answer
    assert [verdict["fits"] for verdict in answer["formats"]] == [False, False, False]


def test_the_smallest_budget_leaves_the_host_what_it_can_hold(monde: Monde) -> None:
    """Here it is not the dense weights that decide: the host takes few experts, the others need slots."""
    short = ("-m", "h200", "--context", "64")
    all_on_gpu = json.loads(monde("plan", MODEL, *short, "--json").stdout)
    staging_bytes = all_on_gpu["host_used_bytes"]
    budget = (*short, "--host-memory", staging_bytes + all_on_gpu["expert_bytes"] // 2, "--gpu-memory")
    least = json.loads(monde("plan", MODEL, *short, "--gpu-memory", "1MiB", "--json").stdout)
    outcome = monde("plan", MODEL, *budget, least["smallest_gpu_bytes"])
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("monde: error: host_memory of ")
    found = re.search(r"--gpu-memory (\d+)", outcome.stderr)
    assert found is not None
    smallest = int(found.group(1))
    assert smallest > least["smallest_gpu_bytes"]
    assert monde("plan", MODEL, *budget, smallest).exit_code == 0
    assert monde("plan", MODEL, *budget, smallest - 1).exit_code == 2


def test_what_cannot_be_at_any_budget_names_what_is_missing(monde: Monde, tmp_path: Path) -> None:
    too_long = monde("plan", MODEL, "-m", "h200", "--context", 10**8)
    assert too_long.exit_code == 2
    assert "lower --context or --batch, or use a smaller model" in too_long.stderr
    little = dataclasses.replace(DESCRIBED["h200"], memory_bytes=2**19)
    little.save(tmp_path / "little.json")
    for machine, options, remedy in (
        ("h200", ("--host-memory", "1KiB"), "raise --host-memory"),
        (tmp_path / "little.json", (), "add host memory"),
    ):
        outcome = monde("plan", MODEL, "-m", machine, "--gpu-memory", smallest_budget(monde), *options)
        assert outcome.exit_code == 2
        assert f"{remedy}, or use a smaller model" in outcome.stderr


def test_shorter_sequences_are_a_remedy_without_a_gpu_where_they_help(monde: Monde, tmp_path: Path) -> None:
    """Keys and values lie in host memory there. At 5 MiB not even one token would do."""
    dataclasses.replace(DESCRIBED["h200"], gpu=None).save(tmp_path / "host.json")
    for budget, remedy in (("12MiB", ", lower --context or --batch, or use"), ("5MiB", ", or use")):
        outcome = monde("plan", MODEL, "-m", tmp_path / "host.json", "--host-memory", budget)
        assert outcome.exit_code == 2
        assert re.search(rf"Give at least --host-memory \d+{remedy} a smaller model", outcome.stderr), (
            outcome.stderr
        )


def test_remedies_that_could_not_work_are_not_named(monde: Monde, tmp_path: Path) -> None:
    h200 = DESCRIBED["h200"]
    assert h200.gpu is not None
    dataclasses.replace(h200, gpu=dataclasses.replace(h200.gpu, memory_bytes=2**21)).save(
        tmp_path / "card.json"
    )
    dataclasses.replace(h200, gpu=None, memory_bytes=2**21).save(tmp_path / "host.json")
    card = monde("plan", MODEL, "-m", tmp_path / "card.json").stderr
    assert "take a GPU with more memory, or use a smaller model" in card
    assert "--context" not in card
    host = monde("plan", MODEL, "-m", tmp_path / "host.json").stderr
    assert "Add host memory, or use a smaller model" in host
    tiny = monde("plan", MODEL, "-m", "h200", "--gpu-memory", "1B").stderr
    assert re.search(r"Give at least --gpu-memory \d+\.", tiny)


@pytest.mark.parametrize(
    ("field", "value"),
    [("memory_bytes", "23GiB"), ("memory_bytes", -5), ("eager_block_s", -1.0), ("host_call_s", float("nan"))],
)
def test_a_profile_of_wrong_numbers_is_damaged(
    monde: Monde, tmp_path: Path, field: str, value: object
) -> None:
    DESCRIBED["h200"].save(tmp_path / "profile.json")
    record = json.loads((tmp_path / "profile.json").read_text()) | {field: value}
    (tmp_path / "profile.json").write_text(json.dumps(record))
    outcome = monde("plan", MODEL, "-m", tmp_path / "profile.json")
    assert outcome.exit_code == 2
    assert f"damaged hardware profile ({field} of profile is" in outcome.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8_e4m3fn"}, "monde runs bf16, fp16 and fp32"),
        ({"num_key_value_heads": 0}, "its config.json describes no model"),
        ({"vocab_size": -1}, "its config.json describes no model"),
    ],
)
def test_a_configuration_of_no_model(
    monde: Monde, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    config = json.loads((MODEL / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = monde("plan", tmp_path, "-m", "h200")
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_an_index_that_lacks_an_expert(monde: Monde, tmp_path: Path) -> None:
    shutil.copy(MODEL / "config.json", tmp_path)
    num_experts = json.loads((MODEL / "config.json").read_text())["num_experts"]
    outlined = outline_of(str(MODEL), 8, 1)
    names = [
        f"model.layers.{l}.mlp.experts.{e}.{part}_proj.weight"
        for l in range(len(outlined.size.layers))
        for e in range(num_experts)
        for part in ("gate", "up", "down")
    ]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    assert monde("plan", tmp_path, "-m", "h200").exit_code == 0
    del index["weight_map"][names[7]]
    file.write_text(json.dumps(index))
    outcome = monde("plan", tmp_path, "-m", "h200")
    assert outcome.exit_code == 2
    assert f"tensors for the {num_experts} experts of model.layers.0.mlp.experts." in outcome.stderr
    file.write_text(json.dumps({"weight_map": {names[0]: 3}}))
    assert "its weight_map names no files" in monde("plan", tmp_path, "-m", "h200").stderr


def test_a_format_changes_bytes_and_speed(monde: Monde) -> None:
    answers = {
        name: json.loads(monde("plan", MODEL, "-m", "laptop-4060", "--format", name, "--json").stdout)
        for name in ("fp32", "bf16", "fp16")
    }
    assert answers["fp32"]["expert_bytes"] == 2 * answers["bf16"]["expert_bytes"]
    assert answers["fp32"]["dense_bytes"] > 1.9 * answers["bf16"]["dense_bytes"]
    assert answers["bf16"]["expert_bytes"] == answers["fp16"]["expert_bytes"]
    for name, answer in answers.items():
        assert answer["format"] == name
        assert answer["best_format"] == answer["stored_format"]
        mine = next(v for v in answer["formats"] if v["format"] == name)
        assert mine["decode_tokens_per_s"] == answer["decode"]["tokens_per_s"]
    auto = json.loads(monde("plan", MODEL, "-m", "laptop-4060", "--json").stdout)
    assert auto == answers[auto["stored_format"]]
    assert monde("plan", MODEL, "-m", "h200", "--format", "int3").exit_code == 2


def test_a_wide_checkpoint_gets_a_format_that_fits(monde: Monde, tmp_path: Path) -> None:
    """In fp32 the experts do not fit; the line of the error says what does."""
    config = json.loads((MODEL / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    wide = json.loads(monde("plan", tmp_path, "-m", "h200", "--gpu-memory", "1MiB", "--json").stdout)
    staging_bytes = json.loads(monde("plan", tmp_path, "-m", "h200", "--json").stdout)["host_used_bytes"]
    bf16 = json.loads(monde("plan", tmp_path, "-m", "h200", "--format", "bf16", "--json").stdout)
    budget = ("--gpu-memory", wide["smallest_gpu_bytes"])
    budget += ("--host-memory", staging_bytes + int(1.2 * bf16["expert_bytes"]))
    refused = monde("plan", tmp_path, "-m", "h200", *budget)
    assert refused.exit_code == 2
    assert refused.stderr.rstrip().endswith("As it is, --format bf16 fits.")
    told = monde("plan", tmp_path, "-m", "h200", *budget, "--format", "bf16")
    assert told.exit_code == 0
    assert "best format that fits: bf16 (the checkpoint's fp32 does not)" in told.stdout


def test_recorded_routing_is_played(monde: Monde, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steps = tuple(tuple(rng.integers(0, 16, (1, 2)).astype(np.int16) for _ in range(4)) for _ in range(12))
    Trace("moe-3m", (16,) * 4, steps).save(tmp_path / "t.npz")
    budget = ("-m", "h200", "--gpu-memory", smallest_budget(monde), "--routing", tmp_path / "t.npz")
    answer = json.loads(monde("plan", MODEL, *budget, "--json").stdout)
    assert answer["routing"]["num_steps"] == 12
    assert answer["routing"]["steps_per_s"] == pytest.approx(answer["decode"]["tokens_per_s"], rel=0.15)
    assert {"host", "gpu"} <= set(answer["routing"]["busy_share"])
    assert "recorded routing: 12 steps" in monde("plan", MODEL, *budget).stdout
    Trace("other", (16,) * 3, tuple(step[:3] for step in steps)).save(tmp_path / "t.npz")
    assert (
        "with 3 layers of 16 experts, this one has 4 of 16; give the trace"
        in monde("plan", MODEL, *budget).stderr
    )
    Trace("other", (12,) * 4, steps).save(tmp_path / "t.npz")
    assert (
        "with 4 layers of 12 experts, this one has 4 of 16; give the trace"
        in monde("plan", MODEL, *budget).stderr
    )


def test_a_measured_profile_is_a_file(monde: Monde, tmp_path: Path) -> None:
    DESCRIBED["epyc-4090"].save(tmp_path / "mine.json")
    answers = [
        json.loads(monde("plan", MODEL, "-m", machine, "--json").stdout)
        for machine in (tmp_path / "mine.json", "epyc-4090")
    ]
    assert [answer.pop("profile") for answer in answers] == [str(tmp_path / "mine.json"), "epyc-4090"]
    assert answers[0] == answers[1]


def test_this_machine_is_the_default_once_it_is_measured(
    monde: Monde, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    refused = monde("plan", MODEL)
    assert refused.exit_code == 2
    assert "run `monde calibrate`, or give --machine" in refused.stderr
    noise = Noise("host read, 2 threads, per byte", 1e-11, 2e-11)
    here = store.this_machine()
    store.save(dataclasses.replace(DESCRIBED["laptop-4060"], machine=here, noisy=(noise,)))
    outcome = monde("plan", MODEL)
    assert outcome.exit_code == 0, outcome.stderr
    assert f"profile of this machine, calibrated: {here.name}" in outcome.stdout
    assert "1 figures in doubt" in outcome.stdout
    assert "profile of h200" in monde("plan", MODEL, "-m", "h200").stdout


def test_the_checkpoint_says_what_it_holds(monde: Monde) -> None:
    answer = json.loads(monde("plan", MODEL, "-m", "h200", "--json").stdout)
    stored = answer["checkpoint"]
    entries = read_header(MODEL / "model.safetensors").values()
    assert stored["dense_bytes"] + stored["expert_bytes"] == sum(e.end - e.start for e in entries)
    assert stored["expert_bytes"] == answer["expert_bytes"]
    assert (stored["num_files"], stored["unused_bytes"]) == (1, 0)


def test_a_channel_is_worth_something_where_memory_is_the_limit(monde: Monde, tmp_path: Path) -> None:
    launches = dict.fromkeys(("eager_block_s", "host_call_s", "step_s"), 0.0)
    host_only = dataclasses.replace(DESCRIBED["laptop-4060"], gpu=None, **launches)
    host_only.save(tmp_path / "host.json")
    answer = json.loads(monde("plan", MODEL, "-m", tmp_path / "host.json", "--json").stdout)
    assert answer["memory_channels"] == {"num_channels": 2, "channel_bytes_per_s": 44.8e9}
    assert (
        1.3 < answer["decode"]["gain_of_one_more_memory_channel"] <= 1.5
    )  # of two channels, one more is half
    unknown = json.loads(monde("plan", MODEL, "-m", "h200", "--json").stdout)
    assert unknown["decode"]["gain_of_one_more_memory_channel"] is None


def test_a_plot_of_budgets(monde: Monde, tmp_path: Path) -> None:
    picture = tmp_path / "budgets.svg"
    outcome = monde("plan", MODEL, "-m", "h200", "--plot", picture)
    assert outcome.exit_code == 0, outcome.stderr
    assert "gpu_memory in GiB" in picture.read_text()
    host_only = dataclasses.replace(DESCRIBED["h200"], gpu=None)
    host_only.save(tmp_path / "host.json")
    refused = monde("plan", MODEL, "-m", tmp_path / "host.json", "--plot", picture)
    assert refused.exit_code == 2
    assert "no budget to vary" in refused.stderr
    refused = monde("plan", MODEL, "-m", tmp_path / "host.json", "--gpu-memory", "1GiB")
    assert "h200 has no GPU; leave gpu_memory out" in refused.stderr
    assert monde("plan", MODEL, "-m", "h200", "--plot", tmp_path / "budgets.txt").exit_code == 2


def test_a_tight_host_releases_copies_of_residents(monde: Monde) -> None:
    budget = ("-m", "h200", "--gpu-memory", smallest_budget(monde) + 2**20)
    ample = json.loads(monde("plan", MODEL, *budget, "--json").stdout)
    assert ample["num_released"] == ample["saved_host_bytes"] == 0
    tight = (*budget, "--host-memory", ample["host_used_bytes"] - 1)
    found = re.search(
        r"host copies of (\d+) residents released \(.* saved\)", monde("plan", MODEL, *tight).stdout
    )
    assert found is not None
    answer = json.loads(monde("plan", MODEL, *tight, "--json").stdout)
    assert answer["num_released"] == int(found.group(1)) == ample["num_resident"]
    assert answer["host_used_bytes"] == ample["host_used_bytes"] - answer["saved_host_bytes"]


def test_a_sweep_goes_from_what_fits_to_what_holds_everything() -> None:
    size = ModelSize(100, 0, 0, 0, 0, 1, (LayerSize(10, 10, 10),) * 4)

    def forecast(gpu_bytes: int) -> Forecast:
        speed = Speed(1, 1.0, {})
        return Forecast(plan_memory(size, True, gpu_bytes, 300), speed, speed)

    found = [f.plan.gpu_bytes for f in sweep(forecast, forecast(300), card_bytes=10_000)]
    assert found[0] >= 200  # 100 bytes fixed; below 200 the host cannot hold the others
    assert found[-1] == 500
    assert found == sorted(found)
    assert sweep(forecast, forecast(300), card_bytes=400)[-1].plan.gpu_bytes == 400


def test_known_heat_makes_slots_worth_more(monde: Monde, tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    budget = ("-m", "h200", "--gpu-memory", smallest_budget(monde) + 2**20, "--json")
    counts = [np.array([90, 90, 90, 90] + [1] * 12, np.float32) for _ in range(4)]
    Heat("moe-3m", tuple(counts), 100.0).save(path)
    equal, hot = monde("plan", MODEL, *budget), monde("plan", MODEL, *budget, "--heat", path)
    assert json.loads(hot.stdout)["decode"]["step_s"] < json.loads(equal.stdout)["decode"]["step_s"]
    Heat("another", (counts[0],), 100.0).save(path)
    refused = monde("plan", MODEL, *budget, "--heat", path)
    assert refused.exit_code == 2
    assert "record the heat of this model" in refused.stderr


def test_what_the_machine_lacks_is_refused(monde: Monde) -> None:
    outcome = monde("plan", MODEL, "-m", "laptop-4060", "--gpu-memory", "24GiB")
    assert outcome.exit_code == 2
    assert "more than the 8 GiB of laptop-4060" in outcome.stderr
    outcome = monde("plan", MODEL, "-m", "abacus")
    assert outcome.exit_code == 2
    assert "described machines h200, laptop-4060" in outcome.stderr


def test_a_prompt_is_no_longer_than_the_longest_sequence(monde: Monde) -> None:
    outcome = monde("plan", MODEL, "-m", "h200", "--context", 256, "--prompt", 300)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith(
        "monde: error: --prompt 300 is longer than the longest sequence, of 256 tokens"
    )
    assert outcome.stderr.count("\n") == 1
    assert "or give --context 300 or more" in outcome.stderr
    assert monde("plan", MODEL, "-m", "h200", "--context", 300, "--prompt", 300).stderr == ""
    assert json.loads(monde("plan", MODEL, "-m", "h200", "--context", 256, "--json").stdout)["prompt"] == 256


def test_a_sequence_that_the_model_was_not_made_for_is_warned_of(monde: Monde) -> None:
    """The model has 1024 positions, which the default keeps to."""
    assert json.loads(monde("plan", MODEL, "-m", "h200", "--json").stdout)["context"] == 1024
    assert monde("plan", MODEL, "-m", "h200", "--context", 1024).stderr == ""
    outcome = monde("plan", MODEL, "-m", "h200", "--context", 1025, "--json")
    assert json.loads(outcome.stdout)["context"] == 1025
    assert outcome.stderr.startswith("monde: warning: --context 1025 is longer than the 1024 positions that ")
    assert outcome.stderr.count("\n") == 1


def test_a_mesh_plans_exchanges(monde: Monde) -> None:
    outcome = monde("plan", MODEL, "--mesh", "2x4", "--network", "a800-1nic", "-p", 8192)
    assert outcome.exit_code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    first = next(line for line in lines[lines.index("") + 2 :])
    name = first.split("  ")[0]
    assert f"chosen: {name}: " in outcome.stdout
    assert "sharding" in outcome.stdout
    asked = json.loads(
        monde("plan", MODEL, "--mesh", "2x4", "--network", "a800-1nic", "-p", 8192, "--json").stdout
    )
    assert asked["chosen"] == name == asked["candidates"][0]["name"]
    assert [c["layer_s"] for c in asked["candidates"]] == sorted(c["layer_s"] for c in asked["candidates"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "2by4"], "expected nodes x ranks of a node, as 2x8, got '2by4'"),
        (["--mesh", "2x4"], "which network\\? Give --network"),
        (
            ["--mesh", "2x4", "--network", "ether"],
            "neither a file nor one of the described clusters a800-1nic",
        ),
        (["--network", "10gbe"], "--network without --mesh"),
        (["--mesh", "2x4", "--network", "10gbe", "-m", "h200"], "--machine: has no meaning for exchanges"),
        (
            ["--mesh", "2x4", "--network", "10gbe", "--context", "99"],
            "--context: has no meaning for exchanges",
        ),
    ],
)
def test_a_mesh_that_cannot_be_planned(monde: Monde, options: list[str], message: str) -> None:
    outcome = monde("plan", MODEL, *options)
    assert outcome.exit_code == 2
    assert re.search(message, outcome.stderr)
    assert outcome.stderr.count("\n") == 1


def test_ranks_make_one_plan() -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "monde",
    ]
    command = [*launcher, "plan", str(MODEL), "-m", "h200", "--context", "2000"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("profile of h200") == 1
    assert done.stderr.count("monde: warning") == 1


def test_a_measured_network_is_of_one_mesh(monde: Monde, tmp_path: Path) -> None:
    CLUSTERS["10gbe"].profile().save(tmp_path / "net.json")
    assert monde("plan", MODEL, "--mesh", "2x4", "--network", tmp_path / "net.json").exit_code == 0
    outcome = monde("plan", MODEL, "--mesh", "4x2", "--network", tmp_path / "net.json")
    assert "was measured on 2x4 ranks" in outcome.stderr


def test_an_encoder_decoder_is_planned(monde: Monde, tmp_path: Path) -> None:
    """From its configuration alone: a prompt is the encoder's, a step the decoder's with both halves' attention."""
    from transformers import SwitchTransformersConfig

    shape = {"d_model": 64, "d_ff": 128, "num_experts": 8, "num_layers": 2, "num_sparse_encoder_layers": 1}
    speeds = {}
    for name, num_decoder_layers in (("short", 2), ("deep", 8)):
        config = SwitchTransformersConfig(
            **shape, num_decoder_layers=num_decoder_layers, num_sparse_decoder_layers=1
        )
        config.save_pretrained(tmp_path / name)
        outcome = monde("plan", tmp_path / name, "-m", "h200", "--json")
        assert outcome.exit_code == 0, outcome.stderr
        speeds[name] = json.loads(outcome.stdout)
    short, deep = (speeds[name] for name in ("short", "deep"))
    assert deep["decode"]["tokens_per_s"] < 0.4 * short["decode"]["tokens_per_s"]
    assert deep["prefill"]["tokens_per_s"] > 0.9 * short["prefill"]["tokens_per_s"]
    Trace("demo", (8, 8), ()).save(tmp_path / "t")
    refused = monde("plan", tmp_path / "short", "-m", "h200", "--routing", tmp_path / "t")
    assert refused.exit_code == 2
    assert "--routing: a step of an encoder-decoder runs half of its layers" in refused.stderr
