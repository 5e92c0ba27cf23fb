"""The one table of model families: which adapter reads which family's experts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from monde.models.adapters.aria import AriaAdapter
from monde.models.adapters.base import Adapter
from monde.models.adapters.dbrx import DbrxAdapter
from monde.models.adapters.experts_interface import ExpertsInterfaceAdapter
from monde.models.adapters.jetmoe import JetMoeAdapter
from monde.models.adapters.llama4 import Llama4Adapter
from monde.models.adapters.longcat import LongcatAdapter
from monde.models.adapters.nllb_moe import NllbMoeAdapter
from monde.models.adapters.step3p7 import Step3p7Adapter
from monde.models.adapters.switch import SwitchAdapter

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """One folder of `transformers.models`, how its experts are read, and what is special about it."""

    name: str
    adapter: Adapter
    note: str = ""

    @property
    def is_available(self) -> bool:
        """Whether the installed transformers has this family."""
        return importlib.util.find_spec(f"transformers.models.{self.name}") is not None


EXPERTS_INTERFACE = ExpertsInterfaceAdapter()

_ON_EXPERTS_INTERFACE = """
afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
diffusion_gemma dots1 dots3_note ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4 glm4_moe
glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid
granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling inkling2 jamba kimi_linear kolibri1 laguna lfm2_moe mellum
mimo_v2_flash minimax minimax_m2 minimax_m3_vl mistral4 mistral_large4 mixtral muse_spark nemotron_h olmoe
openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp
solar_open unlimited_ocr zaya
""".split()  # noqa: SIM905 (a list literal would take sixty lines)

_NOTES = {
    "deepseek_v4": "clamped SwiGLU; the first layers route by token id",
    "diffusion_gemma": "GELU; encoder and decoder share their experts, which are held once",
    "ernie4_5_vl_moe": "text and vision experts of different sizes",
    "gemma4": "GELU",
    "glm5_next": "clamped SwiGLU",
    "gpt_oss": "biases, interleaved and transposed weights, clamped SwiGLU with alpha",
    "hy_v4": "clamped SwiGLU",
    "inkling2": "SwiGLU bounded by tanh",
    "minimax_m3_vl": "clamped SwiGLU with alpha",
    "muse_spark": "norm after each expert",
    "nemotron_h": "ungated ReLU squared, optional latent dim",
    "openai_privacy_filter": "biases, transposed weights, clamped SwiGLU with alpha; an encoder",
    "zaya": "top-1 with a skip expert",
}

FAMILIES: tuple[Family, ...] = (
    *(Family(name, EXPERTS_INTERFACE, _NOTES.get(name, "")) for name in _ON_EXPERTS_INTERFACE),
    Family("aria", AriaAdapter(), "on the experts interface since transformers 5.23"),
    Family("dbrx", DbrxAdapter(), "all experts in one matrix per projection"),
    Family("jetmoe", JetMoeAdapter(), "the experts inside attention stay with the dense weights"),
    Family("llama4", Llama4Adapter(), "the score scales the expert's input"),
    Family("longcat_flash", LongcatAdapter(), "identity experts cost nothing"),
    Family(
        "nllb_moe", NllbMoeAdapter(), "corrected routing; nllb_upstream_routing=True reproduces upstream's"
    ),
    Family("step3p7", Step3p7Adapter(), "some layers clamp after the activation"),
    Family("switch_transformers", SwitchAdapter(), "top-1 with capacity, ungated ReLU"),
)

# What transformers has beyond these, and why monde leaves it alone.
UNSUPPORTED: dict[str, str] = {
    "doge": "its experts are single rows found by product keys; there are no matrices to keep on the host",
    "vitpose_backbone": "its experts are chosen per data set, not per token",
}


def supported_families() -> list[Family]:
    """The families that the installed transformers has and monde can run, by name."""
    return sorted((family for family in FAMILIES if family.is_available), key=lambda family: family.name)


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter that serves this very module, or None when it holds no experts that monde knows."""
    for adapter in dict.fromkeys(family.adapter for family in FAMILIES):
        if adapter.matches(module):
            return adapter
    return None
