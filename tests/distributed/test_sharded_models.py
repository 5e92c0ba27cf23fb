"""Whole models over ranks: every family, the answers of one process, whatever each rank asks.

W ranks.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import monde
from tests.distributed.ranks import run_ranks
from tests.models.animals import ANIMALS
from tests.models.oracle import ask, examine
from tests.monde import tiny


def mesh_of_all() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@dataclass(frozen=True)
class Walked:
    """One family on one rank: how far the logits are off, in bounds, and whether generated tokens are the same."""

    family: str
    bounds: float
    same_tokens: bool


def walk(families: list[str], parallel: str) -> list[Walked]:
    """Each rank asks its own inputs of the original and of the model over ranks."""
    walked = []
    for animal in ANIMALS:
        if animal.family not in families:
            continue
        specimen = examine(animal, input_seed=1 + dist.get_rank())
        model = monde.offload(
            copy.deepcopy(specimen.model),
            device="cpu",
            mesh=mesh_of_all(),
            parallel=parallel,
            mesh_timeout_s=60,
        )
        got, want = ask(model, animal, specimen.inputs), specimen.answers
        same = want.tokens is None or torch.equal(got.tokens, want.tokens)
        walked.append(Walked(animal.family, want.distance(got) / specimen.bound, same))
        model.monde.close()
    return walked


AVAILABLE = [animal.family for animal in ANIMALS if animal.is_available]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_every_family(tmp_path: Path, part: int) -> None:
    families = AVAILABLE[part::3]
    parallel = ("sharded", "peers", "auto")[part]
    for rank, walked in enumerate(run_ranks(walk, 2, tmp_path, families, parallel, deadline_s=240)):
        assert [one.family for one in walked] == families
        assert [one for one in walked if one.bounds > 1 or not one.same_tokens] == [], rank


@dataclass(frozen=True)
class Checked:
    """A model from its checkpoint on one rank: worst logits in bounds, of its own prompts and of one that all ranks
    share; whether generated tokens are the same; share of pairs computed from slots."""

    bounds: float
    shared_bounds: float
    same_tokens: bool
    resident: float


def check(cases: list[tuple[str, dict[str, Any]]], folder: Path) -> list[Checked]:
    """Rank r asks r + 1 sequences of 4 + 3 r tokens, then as everybody 2 of 20."""
    rank, checked = dist.get_rank(), []
    for name, settings in cases:
        model = monde.from_pretrained(
            str(folder / name), device="cpu", mesh=mesh_of_all(), mesh_timeout_s=60, **settings
        )
        original, bounds = tiny.build(name, settings.get("dtype", torch.float32)), []
        for ids in (tiny.prompt(rank + 1, 4 + 3 * rank), tiny.prompt(2, 20)):
            want = tiny.expected(original, ids)
            with torch.no_grad():
                bounds.append(
                    float((model(ids).logits.double() - want.logits.double()).abs().max()) / want.tolerance
                )
        ids = tiny.prompt(rank + 1, 4 + 3 * rank)
        same = torch.equal(tiny.greedy(model, ids), tiny.greedy(original, ids))
        checked.append(Checked(*bounds, same, model.monde.counters().hit_rate))
        model.monde.close()
    return checked


# Hot slices on the device, for which the CPU stands in, cold ones on the host.
HALF_RESIDENT = {"gpu_memory": 60_000}
CASES = {
    2: [
        ("qwen3_moe", {"parallel": "auto"}),
        ("deepseek_v3", {"mesh_shares": (2, 1)}),
        ("mixtral", HALF_RESIDENT),
        ("gpt_oss", {"dtype": torch.bfloat16, "gpu_memory": 45_000}),
    ],
    4: [("gpt_oss", {}), ("mixtral", {"parallel": "peers", "cpu_backend": "numba"})],
}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_from_checkpoint(tmp_path: Path, num_ranks: int) -> None:
    for name, _ in CASES[num_ranks]:
        tiny.build(name).save_pretrained(tmp_path / name)
    for checked in run_ranks(check, num_ranks, tmp_path, CASES[num_ranks], tmp_path, deadline_s=120):
        for case, one in zip(CASES[num_ranks], checked, strict=True):
            assert one.bounds <= 1, (case, one)
            assert one.shared_bounds <= 1, (case, one)
            assert one.same_tokens or "dtype" in case[1], (
                case
            )  # in bf16 the likeliest two may be one rounding apart
            assert (0 < one.resident < 1) == ("gpu_memory" in case[1]), (case, one)


def stop_early() -> tuple[int, int]:
    """Rank 1 may say 3 tokens, rank 0 12; both models are called equally often. The length, and steps by rank."""
    rank = dist.get_rank()
    model = monde.offload(tiny.build("olmoe"), device="cpu", mesh=mesh_of_all(), mesh_timeout_s=20)
    ids = tiny.prompt(1, 5)
    model.monde.reset_counters()
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12 if rank == 0 else 3, do_sample=False
    )
    assert torch.equal(tokens, tiny.greedy(tiny.build("olmoe"), ids)[:, : tokens.shape[1]])
    return tokens.shape[1] - 5, model.monde.counters().num_steps


def test_generations_of_different_lengths(tmp_path: Path) -> None:
    (long, long_steps), (short, short_steps) = run_ranks(stop_early, 2, tmp_path)
    assert (long, short) == (12, 3)
    assert long_steps == short_steps == 12


def one_of_two_dims() -> list[int]:
    """Two replicas of two ranks each; the replicas do not talk."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "experts"))
    with pytest.raises(ValueError, match=r'one dimension, got shape \(2, 2\); give mesh\["experts"\]'):
        monde.MondeConfig(mesh=world)
    with pytest.raises(ValueError, match="mesh_shares: expected 2 numbers above 0, one for each rank"):
        monde.MondeConfig(mesh=world["experts"], mesh_shares=(1, 2, 3))
    model = monde.offload(tiny.build("mixtral"), device="cpu", mesh=world["experts"], mesh_timeout_s=20)
    if dist.get_rank() < 2:  # one replica generates, the other does not
        ids = tiny.prompt(2, 6)
        assert torch.equal(tiny.greedy(model, ids), tiny.greedy(tiny.build("mixtral"), ids))
    return list(model.monde.ranked.ranks.agree(dist.get_rank()))


def test_a_dimension_of_a_mesh(tmp_path: Path) -> None:
    assert run_ranks(one_of_two_dims, 4, tmp_path) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def give_back(folder: Path) -> list[bool]:
    """state_dict and save_pretrained are for all ranks; the weights are those that were loaded, bit for bit."""
    want, exact = tiny.build("gpt_oss").state_dict(), []
    for parallel in ("sharded", "peers", "auto"):
        model = monde.offload(tiny.build("gpt_oss"), device="cpu", mesh=mesh_of_all(), parallel=parallel)
        got = model.state_dict()
        model.save_pretrained(folder / parallel)  # transformers lets the first rank write
        dist.barrier()
        saved = AutoModelForCausalLM.from_pretrained(folder / parallel).state_dict()
        exact += [all(torch.equal(want[name], there[name]) for name in want) for there in (got, saved)]
    return exact


def test_weights_come_back_whole(tmp_path: Path) -> None:
    assert run_ranks(give_back, 2, tmp_path, tmp_path) == [[True] * 6] * 2


def _wide() -> Any:
    """156 MiB of experts next to 1 MiB of everything else."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=256, intermediate_size=64, moe_intermediate_size=832, num_hidden_layers=2,
        num_experts=32, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def own_bytes() -> int:
    """Of this process alone, without what malloc keeps of memory that was freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_full_info().uss)


def grown(folder: Path) -> tuple[int, int, int]:
    """Bytes that loading added to this process's own memory, its peak, and the banks'."""
    mesh = mesh_of_all()
    monde.offload(
        tiny.build("qwen3_moe"), device="cpu", mesh=mesh
    ).monde.close()  # what is made once a process
    before = own_bytes()
    model = monde.from_pretrained(str(folder), device="cpu", mesh=mesh, max_context=64)
    held = sum(layer.host.bank.resident_bytes for layer in model.monde.layers)
    return own_bytes() - before, model.monde.load_report.peak_host_bytes, held


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_holds_its_slice_alone(tmp_path: Path, num_ranks: int) -> None:
    model = _wide()
    model.save_pretrained(tmp_path / "wide")
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    for uss_bytes, peak_bytes, held_bytes in run_ranks(grown, num_ranks, tmp_path, tmp_path / "wide"):
        assert experts / num_ranks <= held_bytes < 1.06 * experts / num_ranks  # panels of 16, pages
        # Besides: dense weights, and what allocators keep. The next slice would not fit, at 4 ranks by far.
        assert uss_bytes < held_bytes + 48 * 2**20
        # The peak counts a layer of mapped pages, which are given back after it.
        assert peak_bytes < held_bytes + experts / 2 + 48 * 2**20
