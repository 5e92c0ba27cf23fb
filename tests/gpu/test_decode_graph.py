"""Decode steps as CUDA graphs: replay equals eager launches, and a failed capture leaves everything usable."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache, set_seed

import monde
from monde.models.decode_cache import KvRoom
from monde.models.decode_capture import CudaCapture
from monde.models.decode_graph import install
from monde.models.decode_runner import CAPTURE_AFTER_STEPS
from tests.monde import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOM = KvRoom(bytes=64 << 20, bytes_per_token=1 << 10)
NEW = CAPTURE_AFTER_STEPS + 24
NAMES = ("qwen3_moe", "mixtral")


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    """A fall-back that no test expects is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decode steps run eagerly")
        yield


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(original, the same with graphs), on the GPU."""
    original = tiny.build(name, dtype).cuda()
    # grouped_mm, the default, reads counts back to the host in fp32.
    original.set_experts_implementation("batched_mm")
    model = copy.deepcopy(original)
    install(model, CudaCapture(torch.device("cuda", torch.cuda.current_device())), ROOM)
    return original, model


def prompt(batch: int, length: int = 12) -> Tensor:
    return tiny.prompt(batch, length).cuda()


def static_text(model: Any, ids: Tensor, **settings: Any) -> Any:
    """What `model` generates with a static cache, launched eagerly unless graphs are installed."""
    wanted = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    return model.generate(
        ids,
        max_new_tokens=NEW,
        cache_implementation="static",
        disable_compile=True,
        max_cache_len=256,
        **wanted | settings,
    )


def step_logits(model: Any, ids: Tensor, prefill: int = 6) -> Tensor:
    """Logits [B, T - prefill, V] of one step after another."""
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(ids[:, :prefill], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prefill, ids.shape[1])]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_text_equals_eager(name: str, batch: int) -> None:
    original, model = pair(name)
    for length in (12, 5):
        ids = prompt(batch, length)
        assert torch.equal(static_text(model, ids), static_text(original, ids))
    runner = model._decode_runner
    assert runner.num_captures == 1
    assert runner.num_replays == 2 * (NEW - 1) - CAPTURE_AFTER_STEPS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_eager(name: str, batch: int, dtype: torch.dtype) -> None:
    """The same kernels run, but libraries may choose others on another stream: the bound of rounding holds."""
    original, model = pair(name, dtype)
    ids = prompt(batch, 30)
    got, want = step_logits(model, ids), step_logits(original, ids)
    assert model._decode_runner.num_replays == 24 - CAPTURE_AFTER_STEPS
    if not torch.equal(got, want):
        error = float((got.double() - want.double()).abs().max())
        assert error <= tiny.expected(original, ids).tolerance


def test_beams_and_sampling() -> None:
    original, model = pair("qwen3_moe")
    ids = prompt(2)
    assert torch.equal(static_text(model, ids, num_beams=3), static_text(original, ids, num_beams=3))
    texts = []
    for m in (original, model):
        set_seed(7)
        texts.append(static_text(m, ids, do_sample=True, top_k=8))
    assert torch.equal(*texts)


def test_a_step_that_synchronises_falls_back_and_all_stays_usable() -> None:
    original, model = pair("qwen3_moe")
    hook = model.model.layers[1].mlp.register_forward_hook(lambda module, args, y: y * float(y.sum() * 0 + 1))
    stream, ids = torch.cuda.current_stream(), prompt(2)
    with pytest.warns(RuntimeWarning, match="capture failed") as caught:
        texts = [static_text(model, ids) for _ in range(2)]
    assert len([w for w in caught if "run eagerly" in str(w.message)]) == 1
    assert all(torch.equal(text, static_text(original, ids)) for text in texts)
    hook.remove()
    # The stream, the random generator and the allocator are as they were.
    assert torch.cuda.current_stream() == stream
    set_seed(7)
    sampled = static_text(original, ids, do_sample=True)
    set_seed(7)
    assert torch.equal(static_text(model, ids, do_sample=True), sampled)
    held_bytes = torch.cuda.memory_allocated()
    block = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    del block
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == held_bytes
    other, with_graphs = pair("mixtral")
    assert torch.equal(static_text(with_graphs, ids), static_text(other, ids))
    assert with_graphs._decode_runner.num_captures == 1


def test_recording_again_after_every_graph_is_gone() -> None:
    """As where generations of many batch sizes push each other's caches out of the pool."""
    original, model = pair("mixtral")
    ids = prompt(2)
    want = static_text(original, ids)
    for num_captures in (1, 2, 3):
        assert torch.equal(static_text(model, ids), want)
        assert model._decode_runner.num_captures == num_captures
        model._decode_runner.forget()


def test_two_models_on_two_streams() -> None:
    pairs = [pair(name) for name in NAMES]
    ids = prompt(2)
    wants = [static_text(original, ids) for original, _ in pairs]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def run(idx: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            texts = [static_text(pairs[idx][1], ids) for _ in range(4)]
            wrong.extend(NAMES[idx] for text in texts if not torch.equal(text, wants[idx]))

    for _, model in pairs:  # cuBLAS makes its handles outside of captures
        static_text(model, ids)
    threads = [threading.Thread(target=run, args=(idx,)) for idx in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [model._decode_runner.num_captures for _, model in pairs] == [1, 1]


@pytest.mark.parametrize("gpu_memory", [None, "160MB"])
def test_experts_run_by_monde(gpu_memory: str | None) -> None:
    """The same text whether the executors can be captured or not; if not, one warning says so."""
    original = tiny.build("qwen3_moe").cuda()
    model = monde.offload(copy.deepcopy(original).cpu(), device="cuda:0", gpu_memory=gpu_memory)
    ids = prompt(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts = [static_text(model, ids) for _ in range(2)]
    said = [w for w in caught if "run eagerly" in str(w.message)]
    assert len(said) == (0 if model._decode_runner.num_replays else 1)  # type: ignore[union-attr]
    assert all(torch.equal(text, static_text(original, ids)) for text in texts)
