"""Everything people do with a loaded model: caches, batches, beams, sampling, compilation, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import set_seed

import monde
from tests.monde import tiny


@pytest.fixture(params=[0, "30KB"], ids=["host-only", "some-resident"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(original, the same run by monde)."""
    original = tiny.build("qwen3_moe")
    return original, monde.offload(copy.deepcopy(original), device="cpu", gpu_memory=request.param)


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 3},
    ],
    ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()),
)
def test_generate(pair: tuple[Any, Any], settings: dict[str, Any]) -> None:
    original, model = pair
    ids = tiny.prompt()
    assert torch.equal(tiny.greedy(model, ids, **settings), tiny.greedy(original, ids, **settings))


def test_sampling_with_a_seed(pair: tuple[Any, Any]) -> None:
    texts = []
    for model in pair:
        set_seed(7)
        ids = tiny.prompt()
        texts.append(
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=True, top_k=8
            )
        )
    assert torch.equal(*texts)


def test_left_padded_batch(pair: tuple[Any, Any]) -> None:
    original, model = pair
    ids = tiny.prompt(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, :7] = 0
    ids = ids.masked_fill(mask == 0, 2)
    want = original.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), want)


def test_cached_decode_equals_prefill(pair: tuple[Any, Any]) -> None:
    original, model = pair
    ids = tiny.prompt(2, 9)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6, 9)]
    want = tiny.expected(original, ids)
    tiny.assert_logits(torch.cat(steps, dim=1), tiny.Expected(want.logits[:, 6:], want.tolerance))


def test_compile_fullgraph(pair: tuple[Any, Any]) -> None:
    original, model = pair
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    ids = tiny.prompt()
    with torch.no_grad():
        tiny.assert_logits(compiled(ids).logits, tiny.expected(original, ids))
        tiny.assert_logits(compiled(ids[:1]).logits, tiny.expected(original, ids[:1]))


def test_gradients_are_refused_only_when_asked_for(pair: tuple[Any, Any]) -> None:
    _, model = pair
    logits = model(
        tiny.prompt()
    ).logits  # dense parameters require gradients here, and inference goes through
    with pytest.raises(RuntimeError, match="inference only"):
        logits.sum().backward()


def test_deepcopy_shares_the_experts(pair: tuple[Any, Any]) -> None:
    _, model = pair
    twin, ids = copy.deepcopy(model), tiny.prompt()
    assert twin.monde is model.monde
    # Not bit for bit: between two calls experts may move, and with them where sums are rounded.
    torch.testing.assert_close(twin(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_pickle_is_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="save_pretrained"):
        pickle.dumps(pair[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of lm-eval's own dependencies
def test_lm_eval_scores_and_generates(pair: tuple[Any, Any]) -> None:
    """HFLM takes the model as it is; loglikelihoods and texts are the original's."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    stories = [("the cat", " sat down"), ("a much longer beginning of", " the tale"), ("so", " it goes")]
    scored = [Instance("loglikelihood", {}, story, i) for i, story in enumerate(stories)]
    until = {"until": ["."], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", {}, (context, until), i) for i, (context, _) in enumerate(stories)]
    answers = []
    for model in pair:
        lm = HFLM(pretrained=model, tokenizer=_letters(), device="cpu", batch_size=2, max_length=64)
        answers.append(
            (lm.loglikelihood(scored, disable_tqdm=True), lm.generate_until(asked, disable_tqdm=True))
        )
    (want_scores, want_texts), (got_scores, got_texts) = answers
    assert got_texts == want_texts
    assert all(len(text) > 0 for text in got_texts)
    # A log probability errs by up to twice what its logits do, and at most ten of them are summed.
    allowed = 10 * 2 * tiny.expected(pair[0], tiny.prompt()).tolerance
    for (got, got_is_greedy), (want, want_is_greedy) in zip(got_scores, want_scores, strict=True):
        assert got == pytest.approx(want, abs=allowed)
        assert got_is_greedy == want_is_greedy


def _letters() -> Any:
    """A tokenizer of single bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(i) if i > 31 else f"<{i}>": i for i in range(tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<0>", eos_token="<1>", pad_token="<2>"
    )
