"""Writes docs/models.md from the table of families: python -m docs.models_table"""

from __future__ import annotations

from pathlib import Path

from monde.models.families import EXPERTS_INTERFACE, FAMILIES, UNSUPPORTED, Family
from tests.models.animals import ANIMALS

PAGE = Path(__file__).with_name("models.md")

INTRODUCTION = """\
# Supported model families

Written by `python -m docs.models_table` from the one table, `monde/models/families.py`. A family is a
folder of `transformers.models`; `monde.supported_families()` lists those that the installed transformers
has.

Every family below is tested on a tiny random fp32 model, with transformers 5.17 and 5.23: the logits of
prefill and cached decode are those of the original within a bound measured on the original, greedy text is
identical, every routed pair is counted and weights come back bit for bit. The checkpoint route and any
placement of experts give the same answers (`tests/models/test_walk.py`). Models of several modalities are
tested on text. Models run in fp32, bf16 and fp16; quantised checkpoints are refused.

Routers stay where the model has them. Shared experts, attention experts and everything else that is not a
routed expert stay with the dense weights. In decode steps on a GPU shared experts run beside the routed ones
where that changes nothing (`tests/models/test_beside.py` says in which families, and proves it).

A family that is missing: see [how to add one](adding-a-model-family.md).
"""

NLLB = """
## NLLB-MoE

transformers takes the router's top-1 mask, zeros and ones, for expert ids: only experts 0 and 1 ever run.
monde routes as the router decided. `MondeConfig(nllb_upstream_routing=True)` gives the answers of
transformers instead.
"""


def render() -> str:
    on_interface = [family for family in FAMILIES if family.adapter is EXPERTS_INTERFACE]
    others = [family for family in FAMILIES if family.adapter is not EXPERTS_INTERFACE]
    sections = [
        INTRODUCTION,
        f"## On transformers' experts interface ({len(on_interface)})\n",
        *_table(on_interface),
        f"\n## With an adapter of their own ({len(others)})\n",
        *_table(others),
        NLLB,
        "\n## Not supported\n",
        "| family | why |",
        "|---|---|",
        *(f"| {name} | {why} |" for name, why in sorted(UNSUPPORTED.items())),
    ]
    return "\n".join(sections) + "\n"


def _table(families: list[Family]) -> list[str]:
    since = {animal.family: animal.since for animal in ANIMALS}
    rows = [f"| {f.name} | {since[f.name]} | {f.note} |" for f in sorted(families, key=lambda f: f.name)]
    return ["| family | tested from transformers | what is special |", "|---|---|---|", *rows]


if __name__ == "__main__":
    PAGE.write_text(render())
