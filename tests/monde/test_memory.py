"""Loading never holds the experts twice, measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from monde.models.memory import PeakMemory

MEGABYTE = 10**6

# A fresh process, so that memory freed by other tests does not hide growth.
_LOAD = """
import sys, monde
model = monde.from_pretrained(sys.argv[1], device="cpu", cpu_backend=sys.argv[2])
report = model.monde.load_report
bank_bytes = sum(layer.host.bank.resident_bytes for layer in model.monde.layers)
dense_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
print(report.peak_host_bytes, report.expert_bytes, bank_bytes, dense_bytes)
"""

# The CPU stands in for a GPU whose slots take half of the experts. argv[2] is the share of what host copies of residents
# take that host_memory has for them.
_LOAD_TIGHT = """
import sys, psutil, monde
size = monde.from_pretrained(sys.argv[1], device="cpu").monde.plan
gpu_memory = size.size.all_slots_bytes // 2
copies_bytes = size.size.expert_bytes // 2
host_memory = size.host_used_bytes - copies_bytes + int(float(sys.argv[2]) * copies_bytes)
before_bytes = psutil.Process().memory_info().rss
model = monde.from_pretrained(sys.argv[1], device="cpu", gpu_memory=gpu_memory, host_memory=host_memory)
held_bytes = psutil.Process().memory_info().rss - before_bytes
print(held_bytes, model.monde.plan.saved_bytes, model.monde.plan.num_spare_places)
"""

_MAKE = """
import sys, torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
torch.set_default_dtype(torch.bfloat16)
config = Qwen3MoeConfig(
    vocab_size=int(sys.argv[2]), hidden_size=512, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4,
)
Qwen3MoeForCausalLM(config).save_pretrained(sys.argv[1], max_shard_size="64MB")
"""


def _python(code: str, *args: object) -> str:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("medium")
    _python(_MAKE, folder, 256)
    return folder


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much dense weight as experts: 2 x 200 MB, of which loading reads next to nothing."""
    folder = tmp_path_factory.mktemp("dense")
    _python(_MAKE, folder, 100_000)
    return folder


def test_loading_holds_experts_once(folder: Path) -> None:
    peak_bytes, expert_bytes, bank_bytes, _ = map(int, _python(_LOAD, folder, "auto").split())
    assert expert_bytes == 8 * 32 * 3 * 512 * 256 * 2
    assert bank_bytes >= expert_bytes
    # Besides the banks: one layer's pages of the checkpoint, dense weights, thread stacks and Python's own
    # growth.
    layer_bytes, dense_bytes = expert_bytes // 8, 20 * MEGABYTE
    assert peak_bytes <= bank_bytes + layer_bytes + dense_bytes + 60 * MEGABYTE


def test_released_copies_of_residents_take_no_memory(folder: Path) -> None:
    ample_bytes, saved_bytes, _ = map(int, _python(_LOAD_TIGHT, folder, 1).split())
    assert saved_bytes == 0
    tight_bytes, saved_bytes, num_spares = map(int, _python(_LOAD_TIGHT, folder, 0.2).split())
    assert num_spares == 16
    assert saved_bytes == (4 * 32 - 16) * 3 * 512 * 256 * 2
    assert ample_bytes - tight_bytes >= saved_bytes - 20 * MEGABYTE


def test_the_peak_is_at_least_what_is_held_afterwards(dense_folder: Path) -> None:
    peak_bytes, _, bank_bytes, dense_bytes = map(int, _python(_LOAD, dense_folder, "auto").split())
    assert dense_bytes > 200 * MEGABYTE
    assert peak_bytes >= bank_bytes + dense_bytes


def test_the_last_sample_is_taken_at_the_end() -> None:
    with PeakMemory() as peak:
        held = b"x" * (64 * MEGABYTE)
        assert peak.stop() >= len(held) - MEGABYTE
