"""Follows docs/adding-a-model-family.md: the Python on that page is what runs here."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import monde
from monde.models import families
from monde.models.adapters import base, by_layout
from tests.models.oracle import EPS

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model-family.md"


class ToyConfig(PreTrainedConfig):  # type: ignore[misc]
    model_type = "toy"

    def __init__(self, **kwargs: Any) -> None:
        self.num_experts, self.hidden_size, self.intermediate_size = 5, 16, 11
        super().__init__(**kwargs)


def run_the_page() -> dict[str, Any]:
    names = {**vars(base), **vars(by_layout), "Family": families.Family, "torch": torch, "nn": nn}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    return names


def test_the_page_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = run_the_page()

    class Toy(PreTrainedModel):  # type: ignore[misc]
        config_class = ToyConfig

        def __init__(self, config: ToyConfig) -> None:
            super().__init__(config)
            self.gate = nn.Linear(config.hidden_size, config.num_experts)
            self.experts = page["ToyExperts"](config)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, x_TD: Tensor) -> Tensor:
            weights_TK, ids_TK = self.gate(x_TD).softmax(-1).topk(2)
            return self.experts(x_TD, ids_TK, weights_TK)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    original, x_TD = Toy(ToyConfig()).eval(), torch.randn(7, 16)
    with pytest.raises(monde.UnsupportedModelError, match="toy"):
        monde.offload(copy.deepcopy(original), device="cpu")

    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, page["TOY"]))
    original.save_pretrained(tmp_path)
    offloaded = monde.offload(copy.deepcopy(original), device="cpu")
    loaded = Toy.from_pretrained(tmp_path, quantization_config=monde.MondeConfig(device="cpu"))
    with torch.no_grad():
        wanted_TD = original(x_TD)
        for model in (offloaded, loaded):
            assert (model(x_TD) - wanted_TD).abs().max() <= (16 + 11 + 2) * EPS * wanted_TD.abs().max()
            assert model.monde.counters().num_pairs == 7 * 2
