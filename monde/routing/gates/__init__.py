"""The gates of layers in training, by the names their users know."""

from __future__ import annotations

from typing import Any

from monde.routing.gates.base import Balance, Gate, Mixture, Pairs, Routing, pairs_of
from monde.routing.gates.expert_choice import ExpertChoiceGate
from monde.routing.gates.softmoe import SoftMoEGate
from monde.routing.gates.token_choice import GShardGate, SigmoidGate, XMoEGate

GATES: dict[str, type[Gate]] = {
    "gshard": GShardGate,
    "sigmoid": SigmoidGate,
    "xmoe": XMoEGate,
    "expert_choice": ExpertChoiceGate,
    "softmoe": SoftMoEGate,
}

__all__ = [
    "GATES",
    "Balance",
    "ExpertChoiceGate",
    "GShardGate",
    "Gate",
    "Mixture",
    "Pairs",
    "Routing",
    "SigmoidGate",
    "SoftMoEGate",
    "XMoEGate",
    "make_gate",
    "pairs_of",
]


def make_gate(name: str, d_model: int, num_experts: int, **options: Any) -> Gate:
    """The gate `name` with its own options. Errors: ValueError for a name or an option that it does not have."""
    if name not in GATES:
        raise ValueError(f"gate {name!r} is unknown; expected one of {', '.join(GATES)}")
    try:
        return GATES[name](d_model, num_experts, **options)
    except TypeError as error:
        raise ValueError(f"gate {name}: {error}") from error
