"""Decode on GPU and host at once, against the float64 oracle. Letters as in monde.core."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from hostcompute import Activation, ActivationKind, DType, ExpertBank, ExpertSpec, make_pool
from monde.core import Placement, RoutedBatch
from tests.hostcompute.bounds import assert_within
from tests.hostcompute.cases import Batch, expected, load_all, make_batch, make_expert

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("hostcompute._native")

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass
class Layers:
    """Layers of one model: experts on both sides, as the table says."""

    specs: list[ExpertSpec]
    experts: list[dict[int, Any]]
    tables: list[list[int]]
    hub: Any
    executors: list[Any]
    pool: Any
    pinned: list[Any]  # host memory that the GPU reads, until the layers go


def torch_array(array: Any) -> torch.Tensor:
    values = array.numpy()
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.view(torch.bfloat16) if array.dtype == "bf16" else tensor


def build(
    specs: list[ExpertSpec],
    residents: list[list[int]],
    x_dtype: str,
    seed: int,
    deadline_s: float = 10.0,
    share: float | None = None,
) -> Layers:
    """share: of F of cold experts that the GPU reads from host memory at first; None: it cannot."""
    from monde.device.pinned import PinnedRange
    from monde.executors.decode import DecodeExecutor, DecodeHub
    from monde.weights.host import HostBlobs
    from monde.weights.slots import ExpertSlots
    from monde.weights.table import SlotTable

    rng, device, pool = np.random.default_rng(seed), torch.device("cuda:0"), make_pool(2)
    experts = [{e: make_expert(rng, spec, "separate") for e in range(spec.num_experts)} for spec in specs]
    banks = [
        load_all(ExpertBank(spec, "native", pool=pool), one) for spec, one in zip(specs, experts, strict=True)
    ]
    hub = DecodeHub(specs, banks, TORCH[x_dtype], device, pool, deadline_s, share or 0.0)
    executors, tables, pinned = [], [], []
    for layer_idx, (spec, resident) in enumerate(zip(specs, residents, strict=True)):
        table = [resident.index(e) if e in resident else -1 for e in range(spec.num_experts)]
        slots = ExpertSlots(spec, len(resident), device) if resident else None
        for slot, e in enumerate(resident):
            assert slots is not None
            slots.write(slot, {role: torch_array(a) for role, a in experts[layer_idx][e].items()})
        heat_E = torch.zeros(spec.num_experts, device=device)
        slot_table = SlotTable(Placement(tuple(table)), device)
        host = None
        if share is not None:
            host = HostBlobs(banks[layer_idx])
            pinned.append(PinnedRange(*host.range_of(0, spec.num_experts), host, device))
        executors.append(DecodeExecutor(layer_idx, spec, slots, slot_table, heat_E, hub, host))
        tables.append(table)
    return Layers(specs, experts, tables, hub, executors, pool, pinned)


def on_gpu(batch: Batch) -> RoutedBatch:
    ids = torch.from_numpy(batch.ids_TK.astype(np.int64))
    return RoutedBatch(*(t.cuda() for t in (torch_array(batch.x_TD), ids, torch_array(batch.weights_TK))))


def bf16_dots(spec: ExpertSpec, x_dtype: str) -> bool:
    return spec.dtype is DType.BF16 and x_dtype == "bf16"


def check(layers: Layers, layer_idx: int, batch: Batch, x_dtype: str, what: str) -> None:
    y_TD = layers.executors[layer_idx].forward(on_gpu(batch)).float().cpu().numpy()
    layers.hub.check()
    spec = layers.specs[layer_idx]
    bound = expected(spec, layers.experts[layer_idx], batch, x_dtype, bf16_dots(spec, x_dtype))
    assert_within(y_TD, bound, what)


@pytest.mark.parametrize("x_dtype", ["bf16", "f32", "f16"])
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("resident", ["none", "some", "all"])
def test_any_types_and_placement(x_dtype: str, dtype: DType, resident: str) -> None:
    rng = np.random.default_rng(11)
    for d_model, d_ffn, gated, bias in ((64, 32, True, False), (200, 72, True, True), (37, 53, False, True)):
        spec = ExpertSpec(9, d_model, d_ffn, dtype, gated, has_bias=bias)
        chosen = {"none": [], "some": [7, 0, 3, 4], "all": list(range(9))}[resident]
        layers = build([spec], [chosen], x_dtype, seed=1)
        for num_tokens, top_k in ((1, 1), (1, 4), (3, 8), (17, 5), (64, 3)):
            batch = make_batch(rng, spec, num_tokens, top_k, x_dtype)
            check(layers, 0, batch, x_dtype, f"{spec}, {resident}, T={num_tokens}, K={top_k}")
        layers.hub.close()


@pytest.mark.parametrize("resident", [[], [7, 0, 3, 4], list(range(8))], ids=["none", "some", "all but one"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_part_of_cold_experts_is_read_from_host_memory(resident: list[int], share: float) -> None:
    rng = np.random.default_rng(12)
    for d_model, d_ffn, gated in ((64, 96, True), (200, 264, True), (37, 104, False)):
        spec = ExpertSpec(
            9,
            d_model,
            d_ffn,
            DType.BF16,
            gated,
            Activation(ActivationKind.SILU if gated else ActivationKind.RELU),
        )
        layers = build([spec], [resident], "bf16", seed=1, share=share)
        for num_tokens, top_k in ((1, 1), (1, 4), (3, 8), (17, 5), (64, 3)):
            batch = make_batch(rng, spec, num_tokens, top_k, "bf16")
            check(layers, 0, batch, "bf16", f"{spec}, {share}, T={num_tokens}, K={top_k}")
        assert layers.hub.count("SHARED_BYTES") > 0
        assert layers.hub.totals().weight_bytes > 0
        layers.hub.close()


def test_the_share_follows_the_seconds_of_both_sides() -> None:
    """From far too much on the GPU towards balance; the answer stays the same all the way."""
    rng = np.random.default_rng(13)
    spec = ExpertSpec(16, 1024, 1024)
    layers = build([spec], [[]], "bf16", seed=1, share=0.9)
    batch = make_batch(rng, spec, 1, 8, "bf16")
    shares = []
    for step in range(60):
        layers.hub.begin_step()
        check(layers, 0, batch, "bf16", f"step {step}")
        shares.append(layers.hub.balance.share)
    assert shares[0] > 0.85
    assert len(set(shares)) > 1
    gpu_s, host_s = layers.hub.mailbox.gpu_s, layers.hub.doorbell.totals.busy_s
    assert gpu_s > 0
    assert host_s > 0
    layers.hub.close()


@pytest.mark.parametrize("kind", list(ActivationKind))
def test_every_activation(kind: ActivationKind) -> None:
    rng = np.random.default_rng(3)
    for gated in (True, False):
        if kind.needs_gate and not gated:
            continue
        activation = Activation(kind, limit=2.0 if kind.needs_gate else float("inf"))
        spec = ExpertSpec(4, 96, 48, DType.BF16, gated, activation)
        layers = build([spec], [[1, 2]], "bf16", seed=2)
        check(layers, 0, make_batch(rng, spec, 5, 3, "bf16"), "bf16", f"{kind.value} gated={gated}")
        layers.hub.close()


def test_layers_take_turns_and_counters_add_up() -> None:
    """Different shapes in one hub; pairs and heat are those of the batches, out-of-range and weight 0 ignored."""
    rng = np.random.default_rng(4)
    specs = [ExpertSpec(8, 128, 64), ExpertSpec(5, 128, 96, has_bias=True), ExpertSpec(16, 128, 32)]
    residents = [[0, 5], list(range(5)), []]
    layers = build(specs, residents, "bf16", seed=3)
    num_pairs, num_resident = 0, 0
    heat = [np.zeros(spec.num_experts) for spec in specs]
    for step in range(40):
        for layer_idx, spec in enumerate(specs):
            batch = make_batch(rng, spec, 1 + step % 20, 4, "bf16")
            check(layers, layer_idx, batch, "bf16", f"step {step}, layer {layer_idx}")
            ids = batch.ids_TK
            wanted = (ids >= 0) & (ids < spec.num_experts) & (batch.weights_TK.float32() != 0)
            table = np.array(layers.tables[layer_idx])
            num_pairs += int(wanted.sum())
            num_resident += int((table[ids[wanted]] >= 0).sum())
            np.add.at(heat[layer_idx], ids[wanted], 1)
    totals = layers.hub.totals()
    assert totals.num_pairs == num_pairs - num_resident
    assert layers.hub.count("RESIDENT_PAIRS") == num_resident
    assert layers.hub.count("COLD_PAIRS") == num_pairs - num_resident
    for layer_idx, executor in enumerate(layers.executors):
        np.testing.assert_array_equal(executor._heat_E.cpu().numpy(), heat[layer_idx])
    layers.hub.close()


def test_a_graph_of_layers_replays() -> None:
    rng = np.random.default_rng(5)
    spec = ExpertSpec(8, 128, 64)
    layers = build([spec, spec], [[0, 5], [1, 2, 3]], "bf16", seed=4)
    batch = on_gpu(make_batch(rng, spec, 4, 4, "bf16"))

    def step() -> list[torch.Tensor]:
        return [executor.forward(batch) for executor in layers.executors]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = step()
    for replay in range(100):
        fresh = make_batch(rng, spec, 4, 4, "bf16")
        routed = on_gpu(fresh)
        for to, source in zip(
            (batch.x_TD, batch.topk_ids_TK, batch.topk_weights_TK),
            (routed.x_TD, routed.topk_ids_TK, routed.topk_weights_TK),
            strict=True,
        ):
            to.copy_(source)
        layers.hub.before_replay()
        graph.replay()
        torch.cuda.synchronize()
        layers.hub.check()
        for layer_idx, y_TD in enumerate(captured):
            bound = expected(spec, layers.experts[layer_idx], fresh, "bf16", bf16_dots=True)
            assert_within(y_TD.float().cpu().numpy(), bound, f"replay {replay}, layer {layer_idx}")
    layers.hub.close()


def test_cold_experts_are_read_where_they_lie() -> None:
    """Host memory has places in another order, which changes between steps; GPU and host read half of F each."""
    from hostcompute import HostPlaces, make_layout
    from monde.device.pinned import PinnedRange
    from monde.executors.decode import DecodeExecutor, DecodeHub
    from monde.weights.host import HostBlobs
    from monde.weights.places import PlacePool, PlaceTable
    from monde.weights.table import SlotTable

    rng, device, host_pool = np.random.default_rng(11), torch.device("cuda:0"), make_pool(2)
    spec = ExpertSpec(8, 128, 256)
    nobody, layout = Placement((-1,) * 8), make_layout(spec)
    experts = {e: make_expert(rng, spec, "separate") for e in range(8)}
    pool = PlacePool(HostPlaces(layout, 10))
    taken = [pool.take() for _ in range(10)]
    for place in (taken[i] for i in (4, 9, 0, 7, 2, 5, 8, 1, 6, 3)):
        pool.give_back(place)
    bank = ExpertBank(spec, "native", pool=host_pool, places=pool.memory)
    table = PlaceTable(bank, pool, nobody, device)
    load_all(bank, experts)
    blobs = HostBlobs(bank, table.place_of_expert_E)
    pinned = PinnedRange(*blobs.range_of(0, 10), blobs, device)
    hub = DecodeHub([spec], [bank], torch.bfloat16, device, host_pool, share=0.5)
    heat_E = torch.zeros(8, device=device)
    executor = DecodeExecutor(0, spec, None, SlotTable(nobody, device), heat_E, hub, blobs)
    layers = Layers([spec], [experts], [[-1] * 8], hub, [executor], host_pool, [pinned])
    for round_idx in range(20):
        check(layers, 0, make_batch(rng, spec, 4, 4, "bf16"), "bf16", f"round {round_idx}")
        torch.cuda.synchronize()
        expert_id, place = round_idx % 8, pool.take()
        blobs.run_B(place, 1).copy_(blobs.blob_B(expert_id))
        left = bank.place_of_expert_E[expert_id]
        table.enter(expert_id, place)
        blobs.run_B(left, 1).fill_(0xFF)  # whoever reads it still computes NaN
        pool.give_back(left)
    assert hub.count("SHARED_BYTES") > 0
    hub.close()


def test_unannounced_replays_are_answered() -> None:
    """Somebody else's graph: nobody tells the host, which naps for a millisecond at a time."""
    rng = np.random.default_rng(6)
    spec = ExpertSpec(8, 128, 64)
    layers = build([spec], [[]], "bf16", seed=5)
    batch = on_gpu(make_batch(rng, spec, 1, 4, "bf16"))
    eager_TD = layers.executors[0].forward(batch).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = layers.executors[0].forward(batch)
    for _ in range(5):
        time.sleep(0.05)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y_TD, eager_TD)
    layers.hub.check()
    layers.hub.close()


class Silent:
    """A doorbell that nobody hears."""

    error = ""

    def expect(self, num_rings: int) -> None: ...

    def reset(self) -> None: ...


def test_a_host_that_does_not_answer_is_an_exception_and_the_next_call_works() -> None:
    from hostcompute.doorbell import Doorbell, MailboxAddresses

    rng = np.random.default_rng(7)
    spec = ExpertSpec(8, 128, 64)
    layers = build([spec, spec], [[0], [1]], "bf16", seed=6, deadline_s=0.2)
    batch = make_batch(rng, spec, 3, 4, "bf16")
    batch.ids_TK[...] = 3
    batch.weights_TK.numpy()[...] = 1
    layers.hub.doorbell.close()  # the host's thread is gone
    layers.hub.doorbell = Silent()
    start_s = time.perf_counter()
    y_TD = layers.executors[1].forward(on_gpu(batch))
    torch.cuda.synchronize()
    assert time.perf_counter() - start_s < 2
    assert torch.isnan(y_TD).all()
    # A new thread on the same mailbox starts from the latest ring.
    places = {field: layers.hub.mailbox.addresses[field] for field in MailboxAddresses.__dataclass_fields__}
    layers.hub.doorbell = Doorbell(layers.hub.banks, MailboxAddresses(**places), DType.BF16, layers.pool)
    with pytest.raises(RuntimeError, match=r"MoE layer 1: the host did not answer within 0\.2 s"):
        layers.hub.check()
    for layer_idx in (0, 1):
        check(layers, layer_idx, batch, "bf16", "after the failure")
    layers.hub.close()


def test_a_missing_expert_names_the_layer() -> None:
    rng = np.random.default_rng(8)
    spec = ExpertSpec(8, 128, 64)
    layers = build([spec], [[0]], "bf16", seed=7)
    batch = make_batch(rng, spec, 2, 4, "bf16")
    batch.ids_TK[...] = 5
    batch.weights_TK.numpy()[...] = 1
    layers.hub.banks[0].release(5)  # behind the table's back
    y_TD = layers.executors[0].forward(on_gpu(batch))
    torch.cuda.synchronize()
    assert torch.isnan(y_TD).all()
    with pytest.raises(RuntimeError, match="expert 5 is not in host memory"):
        layers.hub.check()
    layers.hub.close()
