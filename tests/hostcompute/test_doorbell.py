"""The host's end of the mailbox, with this thread in the GPU's place. Letters as in hostcompute.spec."""

from __future__ import annotations

import dataclasses
import gc
import time
import weakref
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from hostcompute import DType, ExpertBank, ExpertSpec, make_layout, make_pool
from tests.hostcompute.bounds import assert_within
from tests.hostcompute.cases import (
    Batch,
    expected,
    host_array,
    load_all,
    make_batch,
    make_expert,
    sliced,
)

native = pytest.importorskip("hostcompute._native")
doorbell = pytest.importorskip("hostcompute.doorbell")

RING = native.ring_layout()
SPEC = ExpertSpec(num_experts=6, d_model=40, d_ffn=24)
MAX_TOKENS, TOPK = 9, 3
DEADLINE_S = 5.0


BOX = np.dtype(
    [
        ("rung", np.uint64, 8),  # words have a line each
        ("cut", np.uint64, 8),
        ("x_TD", np.uint16, (MAX_TOKENS, 40)),
        ("weights_R", np.float32, MAX_TOKENS * TOPK),
        ("ids_2R", np.int32, 2 * MAX_TOKENS * TOPK),
        ("out_2TD", np.float32, 2 * MAX_TOKENS * 40),
    ]
)


@dataclass
class FakeGpu:
    """Memory of a mailbox and the stores that a kernel makes."""

    answered: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(8, np.uint64))
    boxes: npt.NDArray[np.void] = field(default_factory=lambda: np.zeros(2, BOX))
    number: int = 0

    @property
    def addresses(self) -> doorbell.MailboxAddresses:
        assert BOX.fields is not None
        at = {name.split("_")[0]: self.boxes.ctypes.data + offset for name, (_, offset) in BOX.fields.items()}
        return doorbell.MailboxAddresses(answered=self.answered.ctypes.data, box_bytes=BOX.itemsize, **at)

    def ring(self, layer: int, num_tokens: int, work: bool, later: bool = False) -> None:
        self.number += 1
        word = self.number | layer << RING["LAYER_SHIFT"] | num_tokens << RING["TOKENS_SHIFT"]
        word |= TOPK << RING["TOPK_SHIFT"] | int(work) << RING["WORK_SHIFT"]
        self.boxes["rung"][self.number & 1, 0] = word | int(later) << RING["LATER_SHIFT"]

    def post(self, layer: int, batch: Batch, is_later_TK: npt.NDArray[np.bool_] | None = None) -> None:
        """All of `batch` for now, or what is chosen for later."""
        num_tokens, num_pairs = batch.x_TD.shape[0], batch.ids_TK.size
        box = self.boxes[(self.number + 1) & 1]
        later_TK = np.zeros(batch.ids_TK.shape, bool) if is_later_TK is None else is_later_TK
        box["x_TD"][:num_tokens] = batch.x_TD.numpy()
        box["ids_2R"][:num_pairs] = np.where(later_TK, -1, batch.ids_TK).ravel()
        box["ids_2R"][num_pairs : 2 * num_pairs] = np.where(later_TK, batch.ids_TK, -1).ravel()
        box["weights_R"][:num_pairs] = batch.weights_TK.numpy().ravel()
        box["out_2TD"] = np.nan
        self.ring(layer, num_tokens, not later_TK.all(), bool(later_TK.any()))

    def wait(self, number: int | None = None, whole: bool = True) -> None:
        """For the answer to this ring or the latest one, with what it has for later if `whole`."""
        wanted, end_s = self.number if number is None else number, time.perf_counter() + DEADLINE_S
        while True:
            word = int(self.answered[0])
            ahead, owing = (word & 0xFFFFFFFF) - wanted, word >> RING["OWING_SHIFT"] & 1
            if ahead > 0 or (ahead == 0 and not (whole and owing)):
                return
            assert time.perf_counter() < end_s, "the host did not answer"

    def out_TD(
        self, num_tokens: int, number: int | None = None, later: bool = False
    ) -> npt.NDArray[np.float32]:
        box = self.boxes[(self.number if number is None else number) & 1]
        return box["out_2TD"].reshape(-1, 40)[later * num_tokens :][:num_tokens].copy()

    @property
    def failed(self) -> bool:
        return bool(int(self.answered[0]) >> RING["FAILED_SHIFT"] & 1)


def two_layers(rng: np.random.Generator, pool: object) -> tuple[list[ExpertBank], list[dict]]:
    experts = [{e: make_expert(rng, SPEC, "separate") for e in range(SPEC.num_experts)} for _ in range(2)]
    banks = [load_all(ExpertBank(SPEC, "native", pool=pool), one) for one in experts]
    return banks, experts


def test_layout_twins_agree() -> None:
    for dtype in DType:
        for gated in (True, False):
            for d_model, d_ffn in ((1, 1), (40, 24), (2048, 768), (37, 53)):
                ours = make_layout(ExpertSpec(1, d_model, d_ffn, dtype, gated))
                assert vars(ours) == native.expert_layout(d_model, d_ffn, gated, dtype.value)


def test_the_mailbox_is_kept_until_the_thread_has_ended() -> None:
    """Whoever is torn down in the middle of an exception closes nothing, and in any order."""
    pool, gpu = make_pool(1), FakeGpu()
    banks, _ = two_layers(np.random.default_rng(0), pool)
    kept = weakref.ref(gpu)
    bell = doorbell.Doorbell(banks, gpu.addresses, DType.BF16, pool, memory=gpu)
    del gpu
    gc.collect()
    assert kept() is not None
    bell.close()
    gc.collect()
    assert kept() is None


def test_answers_are_those_of_the_bank() -> None:
    rng, gpu, pool = np.random.default_rng(0), FakeGpu(), make_pool(2)
    banks, experts = two_layers(rng, pool)
    bell = doorbell.Doorbell(banks, gpu.addresses, DType.BF16, pool)
    num_pairs = 0
    for step in range(60):
        bell.expect(2)
        for layer in range(2):
            batch = make_batch(rng, SPEC, 1 + (step + layer) % MAX_TOKENS, TOPK, "bf16")
            gpu.post(layer, batch)
            gpu.wait()
            y_TD = gpu.out_TD(batch.x_TD.shape[0])
            assert_within(y_TD, expected(SPEC, experts[layer], batch, "f32", bf16_dots=True), f"step {step}")
            ids_TK = batch.ids_TK
            wanted_TK = (ids_TK >= 0) & (ids_TK < SPEC.num_experts) & (batch.weights_TK.float32() != 0)
            num_pairs += int(wanted_TK.sum())
    time.sleep(0.01)
    assert bell.totals.num_rings == 120
    assert bell.totals.num_pairs == num_pairs
    assert bell.totals.weight_bytes > 0
    assert bell.error == ""
    bell.close()


def test_who_rings_may_compute_a_part_of_every_expert() -> None:
    rng, gpu, pool = np.random.default_rng(8), FakeGpu(), make_pool(2)
    spec, num_rows = ExpertSpec(num_experts=6, d_model=40, d_ffn=104), 64
    experts = {e: make_expert(rng, spec, "separate") for e in range(spec.num_experts)}
    bank = load_all(ExpertBank(spec, "native", pool=pool), experts)
    ours = ExpertBank(ExpertSpec(spec.num_experts, spec.d_model, num_rows), "native", pool=pool)
    for e, expert in experts.items():
        gate, up = (sliced(expert[role], np.s_[:num_rows]) for role in ("gate", "up"))
        ours.load(e, gate=gate, up=up, down=sliced(expert["down"], np.s_[:, :num_rows]))
    bell = doorbell.Doorbell([bank], gpu.addresses, DType.BF16, pool)
    whole_bytes = []
    for cut_panel in (num_rows // 16, 0):
        gpu.boxes["cut"] = cut_panel
        batch = make_batch(rng, spec, 5, TOPK, "bf16")
        bell.expect(1)
        gpu.post(0, batch)
        gpu.wait()
        y_TD = gpu.out_TD(5)
        if cut_panel:
            part = host_array(np.zeros((5, spec.d_model)), "f32")
            ours.forward(*batch.arguments, out=part)
            y_TD += part.float32()
        assert_within(y_TD, expected(spec, experts, batch, "f32", bf16_dots=True), f"from panel {cut_panel}")
        ids_TK = batch.ids_TK
        wanted_TK = (ids_TK >= 0) & (ids_TK < spec.num_experts) & (batch.weights_TK.float32() != 0)
        time.sleep(0.01)
        whole_bytes.append(bell.totals.weight_bytes / len(np.unique(ids_TK[wanted_TK])))
        bell.reset_totals()
    # Three of seven panels are left to the host.
    assert whole_bytes[0] == pytest.approx(whole_bytes[1] * 3 / 7, rel=1e-3)
    bell.close()


def test_rings_without_work_may_overtake_each_other() -> None:
    rng, gpu, pool = np.random.default_rng(1), FakeGpu(), make_pool(1)
    banks, experts = two_layers(rng, pool)
    bell = doorbell.Doorbell(banks, gpu.addresses, DType.BF16, pool)
    for _ in range(50):
        bell.expect(4)
        for layer in range(3):
            gpu.ring(layer, 1, work=False)
        batch = make_batch(rng, SPEC, 2, TOPK, "bf16")
        gpu.post(1, batch)
        gpu.wait()
        assert_within(
            gpu.out_TD(2), expected(SPEC, experts[1], batch, "f32", bf16_dots=True), "after 3 empty rings"
        )
    time.sleep(0.01)
    assert bell.totals.num_rings == 200
    bell.close()


def part(batch: Batch, is_mine_TK: npt.NDArray[np.bool_]) -> Batch:
    return dataclasses.replace(batch, ids_TK=np.where(is_mine_TK, batch.ids_TK, -1))


def test_what_counts_later_is_answered_apart_while_the_next_ring_arrives() -> None:
    """Every layer waits for what counts now, and for what the layer before left: on the host, or nobody's."""
    rng, gpu, pool = np.random.default_rng(9), FakeGpu(), make_pool(2)
    banks, experts = two_layers(rng, pool)
    bell = doorbell.Doorbell(banks, gpu.addresses, DType.BF16, pool)
    earlier: tuple[int, int, Batch] | None = None
    num_pairs = 0
    for step in range(200):
        layer, num_tokens = step % 2, 1 + step % 4
        batch = make_batch(rng, SPEC, num_tokens, TOPK, "bf16")
        later_TK = rng.random(batch.ids_TK.shape) < (0.0, 0.5, 1.0)[step % 3]
        bell.expect(1)
        gpu.post(layer, batch, later_TK)
        if later_TK.all():
            # Only what is wanted is waited for, so that this ring may still be unseen when the next one comes.
            if earlier is not None:
                gpu.wait(earlier[0])
        else:
            gpu.wait(whole=False)
            want = expected(SPEC, experts[layer], part(batch, ~later_TK), "f32", bf16_dots=True)
            assert_within(gpu.out_TD(num_tokens), want, f"step {step}, now")
        if earlier is not None:
            number, from_layer, left = earlier
            got_TD = gpu.out_TD(left.x_TD.shape[0], number, later=True)
            want = expected(SPEC, experts[from_layer], left, "f32", bf16_dots=True)
            assert_within(got_TD, want, f"step {step}, of the layer before")
        earlier = (gpu.number, layer, part(batch, later_TK)) if later_TK.any() else None
        ids_TK = batch.ids_TK
        num_pairs += int(
            ((ids_TK >= 0) & (ids_TK < SPEC.num_experts) & (batch.weights_TK.float32() != 0)).sum()
        )
    gpu.wait()
    time.sleep(0.01)
    assert bell.totals.num_rings == 200
    assert bell.totals.num_pairs == num_pairs
    assert 0 < bell.totals.later_s < bell.totals.busy_s
    bell.close()


def test_what_counts_later_is_not_cut() -> None:
    rng, gpu, pool = np.random.default_rng(10), FakeGpu(), make_pool(1)
    spec = ExpertSpec(num_experts=6, d_model=40, d_ffn=104)
    experts = {e: make_expert(rng, spec, "separate") for e in range(spec.num_experts)}
    bell = doorbell.Doorbell(
        [load_all(ExpertBank(spec, "native", pool=pool), experts)], gpu.addresses, DType.BF16, pool
    )
    gpu.boxes["cut"] = 4
    batch = make_batch(rng, spec, 2, TOPK, "bf16")
    gpu.post(0, batch, np.ones(batch.ids_TK.shape, bool))
    gpu.wait()
    assert_within(gpu.out_TD(2, later=True), expected(spec, experts, batch, "f32", bf16_dots=True), "whole")
    bell.close()


def test_a_failure_later_reaches_whoever_waits_for_the_next_ring_and_ends_with_a_reset() -> None:
    rng, gpu, pool = np.random.default_rng(11), FakeGpu(), make_pool(1)
    banks, experts = two_layers(rng, pool)
    banks[0].release(2)
    bell = doorbell.Doorbell(banks, gpu.addresses, DType.BF16, pool)
    bad, good = (make_batch(rng, SPEC, 1, TOPK, "bf16") for _ in range(2))
    bad.ids_TK[...] = 2
    bad.weights_TK.numpy()[...] = 1
    everything = np.ones(bad.ids_TK.shape, bool)
    gpu.post(0, bad, everything)
    gpu.post(1, good)
    gpu.wait()
    assert gpu.failed
    assert "layer 0: expert 2" in bell.error
    gpu.post(1, good)
    gpu.wait()
    assert not gpu.failed
    gpu.post(0, bad, everything)  # and a reset, before anybody has seen the answer
    bell.reset()
    assert bell.error == ""
    gpu.post(1, good)
    gpu.wait()
    assert not gpu.failed
    assert_within(gpu.out_TD(1), expected(SPEC, experts[1], good, "f32", bf16_dots=True), "after a reset")
    bell.close()


def test_sleeps_when_nothing_is_expected() -> None:
    """The threads of this bell and pool: others of the process may still be busy with what tests before left."""
    others = {thread.id for thread in psutil.Process().threads()}

    def cpu_s() -> float:
        mine = [thread for thread in psutil.Process().threads() if thread.id not in others]
        assert mine, "no thread of its own"
        return sum(thread.user_time + thread.system_time for thread in mine)

    gpu, pool = FakeGpu(), make_pool(2)
    banks, _ = two_layers(np.random.default_rng(2), pool)
    bell = doorbell.Doorbell(banks, gpu.addresses, DType.BF16, pool)
    bell.expect(1)
    gpu.ring(0, 1, work=False)
    gpu.wait()
    time.sleep(0.1)
    before_s, start_s = cpu_s(), time.perf_counter()
    time.sleep(1.0)
    assert cpu_s() - before_s < 0.02 * (time.perf_counter() - start_s) + 0.02
    bell.close()


def test_an_expected_ring_that_never_comes_costs_little_and_is_still_answered() -> None:
    rng, gpu, pool = np.random.default_rng(3), FakeGpu(), make_pool(1)
    banks, experts = two_layers(rng, pool)
    bell = doorbell.Doorbell(banks, gpu.addresses, DType.BF16, pool, deadline_s=0.05)
    bell.expect(2)
    time.sleep(0.2)  # it has given up polling by now
    batch = make_batch(rng, SPEC, 1, TOPK, "bf16")
    gpu.post(0, batch)
    gpu.wait()
    assert_within(gpu.out_TD(1), expected(SPEC, experts[0], batch, "f32", bf16_dots=True), "late ring")
    bell.reset()
    bell.close()


def test_rings_that_nobody_announced_are_answered() -> None:
    rng, gpu, pool = np.random.default_rng(5), FakeGpu(), make_pool(1)
    banks, experts = two_layers(rng, pool)
    bell = doorbell.Doorbell(banks, gpu.addresses, DType.BF16, pool)
    for _ in range(5):
        time.sleep(0.01)
        batch = make_batch(rng, SPEC, 1, TOPK, "bf16")
        gpu.post(0, batch)
        gpu.wait()
        assert_within(gpu.out_TD(1), expected(SPEC, experts[0], batch, "f32", bf16_dots=True), "unannounced")
    bell.close()


def test_a_missing_expert_is_an_error_that_names_the_layer() -> None:
    rng, gpu, pool = np.random.default_rng(4), FakeGpu(), make_pool(1)
    banks, experts = two_layers(rng, pool)
    banks[1].release(2)
    bell = doorbell.Doorbell(banks, gpu.addresses, DType.BF16, pool)
    batch = make_batch(rng, SPEC, 1, TOPK, "bf16")
    batch.ids_TK[...] = 2
    batch.weights_TK.numpy()[...] = 1
    bell.expect(1)
    gpu.post(1, batch)
    gpu.wait()
    assert "layer 1" in bell.error
    assert "expert 2" in bell.error
    assert gpu.failed
    bell.reset()
    assert bell.error == ""
    bell.expect(1)
    gpu.post(0, batch)
    gpu.wait()
    assert not gpu.failed
    assert_within(gpu.out_TD(1), expected(SPEC, experts[0], batch, "f32", bf16_dots=True), "after an error")
    bell.close()


def test_only_native_banks() -> None:
    with pytest.raises(ValueError, match="native backend, got reference"):
        doorbell.Doorbell([ExpertBank(SPEC, "reference")], FakeGpu().addresses, DType.BF16)
