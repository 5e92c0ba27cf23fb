"""Blobs in torch are byte for byte what the native packer writes. Letters as in hostcompute.spec."""

from __future__ import annotations

import ctypes

import pytest
import torch

from hostcompute import DType, ExpertBank, ExpertSpec, make_layout
from monde.weights.packing import TORCH_DTYPES, pack, unpack
from monde.weights.slots import ExpertSlots, slot_bytes


def random_arrays(spec: ExpertSpec) -> dict[str, torch.Tensor]:
    D, F = spec.d_model, spec.d_ffn
    shapes: dict[str, tuple[int, ...]] = {"up": (F, D), "down": (D, F)} | (
        {"gate": (F, D)} if spec.gated else {}
    )
    if spec.has_bias:
        shapes |= {"up_bias": (F,), "down_bias": (D,)} | ({"gate_bias": (F,)} if spec.gated else {})
    return {role: torch.randn(shape).to(TORCH_DTYPES[spec.dtype]) for role, shape in shapes.items()}


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("d_model", "d_ffn"), [(64, 32), (37, 53), (1, 1), (33, 16)])
def test_same_bytes_as_native(dtype: DType, gated: bool, d_model: int, d_ffn: int) -> None:
    pytest.importorskip("hostcompute._native")
    spec = ExpertSpec(2, d_model, d_ffn, dtype, gated)
    arrays = random_arrays(spec)
    layout = make_layout(spec)
    blob_B = torch.full((layout.weight_bytes,), 0xAB, dtype=torch.uint8)
    pack(spec, arrays, blob_B)
    with ExpertBank(spec, "native") as bank:
        bank.load(1, **arrays)
        address, _ = bank.backend.memory_range
        packed = ctypes.string_at(address + layout.blob_bytes, layout.weight_bytes)
    assert bytes(blob_B.numpy()) == packed
    for role, matrix in unpack(spec, blob_B).items():
        assert torch.equal(matrix, arrays[role])


def test_a_slot_gives_back_what_it_took_and_forgets_the_expert_before() -> None:
    spec = ExpertSpec(4, 37, 53, DType.F16, has_bias=True)
    slots = ExpertSlots(spec, 2, torch.device("cpu"))
    assert slots.num_bytes == 2 * slot_bytes(spec)
    slots.write(1, random_arrays(spec))
    arrays = random_arrays(spec)
    del arrays["up_bias"]
    slots.write(1, arrays)
    read = slots.read(1)
    assert torch.equal(read.pop("up_bias"), torch.zeros(53))
    assert all(torch.equal(read[role].to(arrays[role].dtype), arrays[role]) for role in arrays)
    assert not slots.blobs_SB[0].any()
