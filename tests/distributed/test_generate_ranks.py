"""`generate` over ranks: the tokens of one process, from the same prompts everywhere or from each rank's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import monde
from tests.distributed.ranks import run_ranks
from tests.models.animals import ANIMALS
from tests.models.zoo import build

# F is odd, so that no number of ranks divides it; gpt_oss has biases, switch an encoder as well.
CUTS: dict[str, dict[str, int]] = {
    "qwen3_moe": {"moe_intermediate_size": 23},
    "mixtral": {"intermediate_size": 45},
    "gpt_oss": {"intermediate_size": 45},
    "switch_transformers": {"d_ff": 45},
}
NUM_NEW_TOKENS = 12


def prompts(rank: int) -> list[Tensor]:
    """What everybody asks, long enough to be divided among ranks, and what this rank alone asks."""
    generator = torch.Generator().manual_seed(7)
    shared = torch.randint(3, 90, (2, 20), generator=generator)
    own = torch.randint(3, 90, (1 + rank, 5 + 4 * rank), generator=generator.manual_seed(rank))
    return [shared, own]


def continued(folder: Path, rank: int, mesh: Any = None) -> list[list[list[int]]]:
    """The tokens of greedy and of sampled generation from both prompts."""
    model = monde.from_pretrained(folder, device="cpu", mesh=mesh)
    settings = dict(max_new_tokens=NUM_NEW_TOKENS, pad_token_id=0)
    answers = []
    for ids in prompts(rank):
        mask = torch.ones_like(ids)
        for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7}):
            torch.manual_seed(3)
            answers.append(model.generate(ids, attention_mask=mask, **settings, **sampling).tolist())
    model.monde.close()
    return answers


def answers_of(folder: Path) -> dict[str, list[list[list[int]]]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {family: continued(folder / family, dist.get_rank(), mesh) for family in CUTS}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_text_of_one_process(tmp_path: Path, num_ranks: int) -> None:
    for animal in ANIMALS:
        if animal.family in CUTS:
            tuned = replace(animal, config={**animal.config, **CUTS[animal.family]})
            model = build(tuned)
            model.save_pretrained(tmp_path / animal.family)
    got_W = run_ranks(answers_of, num_ranks, tmp_path, tmp_path, deadline_s=240)
    for family in CUTS:
        for rank, got in enumerate(got_W):
            want = continued(tmp_path / family, rank)
            assert got[family] == want, (family, rank)
            assert got[family][:2] == got_W[0][family][:2]
            assert max(map(len, want[0])) > 8
