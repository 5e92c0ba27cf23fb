"""Submitted forwards, calls from several threads, many banks, one thread, and fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from hostcompute import ExpertBank, ExpertSpec
from tests.hostcompute.cases import Batch, forward, host_array, load_all, make_batch, make_expert

SPEC = ExpertSpec(num_experts=6, d_model=96, d_ffn=80)


def make_bank(backend: str, seed: int = 0) -> ExpertBank:
    generator = np.random.default_rng(seed)
    return load_all(
        ExpertBank(SPEC, backend), {e: make_expert(generator, SPEC, "separate") for e in range(6)}
    )


def batches(num_batches: int) -> list[Batch]:
    generator = np.random.default_rng(1)
    return [make_batch(generator, SPEC, 1 + i % 7, 2) for i in range(num_batches)]


def test_many_in_flight(backend: str) -> None:
    work = batches(40)
    with make_bank(backend) as bank:
        expected = [forward(bank, batch) for batch in work]
        outs = [host_array(np.full(batch.x_TD.shape, np.nan), "f32") for batch in work]
        pending = [bank.submit(*batch.arguments, out=out) for batch, out in zip(work, outs, strict=True)]
        for one in reversed(pending):  # in any order, and again
            one.wait()
            one.wait()
            assert one.done()
            assert one.counts is not None
        for out, y_TD in zip(outs, expected, strict=True):
            np.testing.assert_array_equal(out.float32(), y_TD)


def test_counts(backend: str) -> None:
    x_TD = host_array(np.ones((2, 96)), "f32")
    ids_TK = np.array([[0, 3, -1], [3, 5, 3]])
    weights_TK = np.array([[1, 1, 1], [1, 0, 1]], np.float32)
    with make_bank(backend) as bank:
        pending = bank.submit(x_TD, ids_TK, weights_TK, out=host_array(np.zeros((2, 96)), "f32"))
        pending.wait()
    assert pending.counts is not None
    assert (pending.counts.num_pairs, pending.counts.num_experts) == (4, 2)
    assert pending.counts.weight_bytes >= 2 * SPEC.expert_bytes  # padding is read too


def test_a_submitted_forward_raises_when_waited_for(backend: str) -> None:
    with make_bank(backend) as bank:
        bank.release(2)
        batch = batches(1)[0]
        batch.ids_TK[...] = 2
        batch.weights_TK.numpy()[...] = 1
        with pytest.raises(KeyError, match="never loaded"):
            bank.submit(*batch.arguments, out=host_array(np.zeros(batch.x_TD.shape), "f32")).wait()
        batch.ids_TK[...] = 1
        forward(bank, batch)  # and the bank goes on


def test_threads_call_at_once(backend: str) -> None:
    work = batches(12)
    with make_bank(backend) as bank:
        expected = [forward(bank, batch) for batch in work]
        wrong: list[int] = []

        def caller(first: int) -> None:
            for i in range(60):
                idx = (first + i) % len(work)
                if not np.array_equal(forward(bank, work[idx]), expected[idx]):
                    wrong.append(idx)

        threads = [threading.Thread(target=caller, args=(first,)) for first in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []


def test_many_banks(backend: str) -> None:
    batch = batches(3)[2]
    banks = [make_bank(backend, seed) for seed in range(24)]
    num_threads = threading.active_count()
    answers = [forward(bank, batch) for bank in banks]
    assert threading.active_count() <= num_threads + (os.cpu_count() or 1) + 1
    for bank in banks[::2]:
        bank.close()
    for bank, y_TD in list(zip(banks, answers, strict=True))[1::2]:
        np.testing.assert_array_equal(forward(bank, batch), y_TD)
        bank.close()


def run_script(script: str, **environment: str) -> None:
    """Run `script` in a fresh interpreter that must end well within a minute."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr


PREPARE = """
import os, sys
import numpy as np
from tests.hostcompute.cases import forward, host_array
from tests.hostcompute.test_concurrency import batches, make_bank
bank, batch = make_bank("{backend}"), batches(6)[5]
expected = forward(bank, batch)
"""

FORK = """
out = host_array(np.zeros(batch.x_TD.shape), "f32")
pending = bank.submit(*batch.arguments, out=out)
child = os.fork()
if child == 0:
    try:
        pending.wait()
    except RuntimeError as error:
        assert "before a fork" in str(error), error
    else:
        os._exit(2)
    for _ in range(20):
        assert np.array_equal(forward(bank, batch), expected)
    later = bank.submit(*batch.arguments, out=out)
    later.wait()
    assert np.array_equal(out.float32(), expected)
    second = make_bank("{backend}")
    assert np.array_equal(forward(second, batch), expected)
    second.close()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
pending.wait()
assert np.array_equal(out.float32(), expected)
assert np.array_equal(forward(bank, batch), expected)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork(backend: str) -> None:
    """A bank of the parent computes in the child; what was submitted before the fork is the parent's."""
    run_script((PREPARE + FORK).format(backend=backend))


def test_one_thread(backend: str) -> None:
    run_script(
        (PREPARE + "y = forward(bank, batch); assert np.array_equal(y, expected)").format(backend=backend),
        MONDE_NUM_THREADS="1",
    )


@pytest.mark.parametrize("threads", ["0", "-1", "many", "4096"])
def test_impossible_thread_counts(threads: str) -> None:
    run_script(
        "import pytest\nfrom tests.hostcompute.test_concurrency import make_bank\n"
        "with pytest.raises(ValueError, match='MONDE_NUM_THREADS: expected .* every core$'): make_bank('auto')",
        MONDE_NUM_THREADS=threads,
    )


def test_dropping_a_submitted_forward_is_safe(backend: str) -> None:
    """Its arrays must not be reused while it still writes to them."""
    batch = batches(6)[5]
    with make_bank(backend) as bank:
        expected = forward(bank, batch)
        for _ in range(200):
            bank.submit(*batch.arguments, out=host_array(np.zeros(batch.x_TD.shape), "f32"))
            fresh = np.zeros(batch.x_TD.shape, np.float32)
        assert not fresh.any()
        np.testing.assert_array_equal(forward(bank, batch), expected)


def test_exit_with_work_under_way(backend: str) -> None:
    """An interpreter that leaves without close() or wait() ends, and ends well."""
    run_script(
        (
            PREPARE + "out = host_array(np.zeros(batch.x_TD.shape), 'f32')\n"
            "many = [bank.submit(*batch.arguments, out=out) for _ in range(50)]"
        ).format(backend=backend)
    )
