"""Attention under another name: for every family the same answer, sparse attention among them."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from monde.models.attention import replace_sdpa
from tests.models import zoo
from tests.models.animals import Animal
from tests.models.zoo import EVERY_ANIMAL, build

# Their code compares the name before it masks what an indexer leaves out.
ASK = "axk2 deepseek_v32 glm5_next glm_moe_dsa hy_v4 minimax_m3_vl"
NUM_TOKENS = 24


@pytest.mark.parametrize("animal", EVERY_ANIMAL)
@torch.no_grad()
def test_every_family_answers_the_same(animal: Animal, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, few in (("index_topk", 4), ("index_kpool", 2), ("index_topk_blocks", 1)):
        monkeypatch.setitem(zoo.TINY, setting, few)  # fewer keys than the prompt has
    model, calls = build(animal), []
    ids = torch.randint(3, 90, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if animal.kind in ("encoder_decoder", "block_diffusion"):
        inputs["decoder_input_ids"] = ids.flip(0)
    wanted = model(**inputs).logits

    def told(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)  # type: ignore[arg-type]

    is_replaced = replace_sdpa(model, "monde_test", told)
    torch.testing.assert_close(model(**inputs).logits, wanted)
    assert bool(calls) <= is_replaced
    if animal.family in ASK.split():
        assert not is_replaced


def test_models_of_one_config_are_apart() -> None:
    animal = Animal("mixtral", "MixtralForCausalLM")
    first = build(animal)
    second = type(first)(first.config)
    assert first.config is second.config
    assert replace_sdpa(first, "monde_test", sdpa_attention_forward)
    assert not replace_sdpa(first, "monde_test", sdpa_attention_forward), "nothing is left to replace"
    names = {module.config._attn_implementation for module in first.modules() if hasattr(module, "config")}
    assert names == {"monde_test"}
    assert second.config._attn_implementation == "sdpa"
    assert len({id(module.config) for module in first.modules() if hasattr(module, "config")}) == 1
