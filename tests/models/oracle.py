"""What the walk compares with: the original's answers, how far rounding may move them, its routed pairs.

Letters: T tokens, D model dim, F expert hidden dim, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from monde.models.families import adapter_of
from tests.models.animals import Animal
from tests.models.zoo import build, example_inputs

NUM_NEW_TOKENS = 5
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Answers:
    """Logits of a prefill over all positions; logits and tokens of a greedy generation with a cache."""

    prefill: Tensor
    decode: Tensor | None
    tokens: Tensor | None

    def distance(self, other: Answers) -> float:
        """Largest difference of any logit."""
        far = float((self.prefill - other.prefill).abs().max())
        if self.decode is None or other.decode is None:
            return far
        return max(far, float((self.decode - other.decode).abs().max()))


@dataclass(frozen=True)
class Specimen:
    """An original model and its answers. `bound`: how far from them a correct twin's logits may be."""

    animal: Animal
    model: Any
    inputs: dict[str, Tensor]
    answers: Answers
    bound: float
    num_pairs: int


@torch.no_grad()
def ask(model: Any, animal: Animal, inputs: dict[str, Tensor]) -> Answers:
    prefill = model(**inputs).logits
    if animal.kind not in ("decoder", "encoder_decoder"):
        return Answers(prefill, None, None)
    generated = model.generate(
        inputs["input_ids"],
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Answers(prefill, torch.stack(generated.logits, dim=1), generated.sequences)


def examine(animal: Animal, input_seed: int = 1, device: str = "cpu") -> Specimen:
    model = build(animal).to(device)
    inputs = {name: ids.to(device) for name, ids in example_inputs(animal, input_seed).items()}
    if animal.family == "nllb_moe":
        correct_nllb_routing(model)
    experts = [module for module in model.modules() if adapter_of(module) is not None]
    counted: list[int] = []
    hooks = [module.register_forward_pre_hook(partial(_count_pairs, counted)) for module in experts]
    answers = ask(model, animal, inputs)
    for hook in hooks:
        hook.remove()
    shaken = [shake(model, experts, animal, inputs, seed) for seed in (0, 1)]
    bound = 2 * max(answers.distance(other) for other in shaken) + EPS * float(answers.prefill.abs().max())
    return Specimen(animal, model, inputs, answers, bound, sum(counted))


def shake(model: Any, experts: list[nn.Module], animal: Animal, inputs: Any, seed: int) -> Answers:
    """The original's answers with every experts module wrong by as much as rounding can make it.

    Only what experts return differs between a model and its wrapped twin. A sum of n products in fp32, in any
    order, is off by about n eps times its size, and n = D + F + K from a token to its output. Original and
    twin may both be off, in opposite directions: twice that, with random signs. What it does to the logits
    is measured, so depth, norms and routers count as they are; `examine` doubles it, as two draws of signs
    are not the worst.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturb(relative: float, module: nn.Module, args: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        signs = (torch.randint(0, 2, y.shape, generator=generator) * 2 - 1).to(y.device)
        y = y + relative * signs * y.abs().amax(dim=-1, keepdim=True)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    hooks = []
    for module in experts:
        spec = adapter_of(module).spec(module)
        relative = 2 * EPS * (spec.d_model + spec.d_ffn + 2)
        hooks.append(module.register_forward_hook(partial(disturb, relative)))
    answers = ask(model, animal, inputs)
    for hook in hooks:
        hook.remove()
    return answers


def correct_nllb_routing(model: nn.Module) -> None:
    """Make NLLB-MoE's experts follow their router: every expert on every token, times its combine weight."""

    def forward(module: Any, x_TD: Tensor, top1_mask_TE: Tensor, weights_TE: Tensor) -> Tensor:
        experts = [module[f"expert_{e}"](x_TD) * weights_TE[:, e, None] for e in range(module.num_experts)]
        return torch.stack(experts).sum(dim=0) * (1 - module.moe_token_dropout)

    for module in model.modules():
        if type(module).__name__ == "NllbMoeExperts":
            module.forward = partial(forward, module)


def _count_pairs(counted: list[int], module: Any, args: tuple[Tensor, ...]) -> None:
    """Routed pairs that need arithmetic, from what the original's own router says."""
    counted.append(_PAIR_COUNTERS.get(type(module).__name__, _routed)(module, *args))


def _routed(module: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor | None = None) -> int:
    if weights_TK is None:  # Aria before 5.23: the second argument are router logits
        ids_TK, weights_TK = module.route_tokens_to_experts(ids_TK)
    num_experts = (
        getattr(module, "num_routed_experts", None)
        or getattr(module, "num_experts", None)
        or module.fc1.groups
    )
    return int(((ids_TK < num_experts) & (weights_TK != 0)).sum())


_PAIR_COUNTERS: dict[str, Callable[..., int]] = {
    "SwitchTransformersExperts": lambda module, x, chosen, weights: int(chosen.sum()),
    "NllbMoeExperts": lambda module, x, top1, weights: int((weights != 0).sum()),
    "Llama4TextMoe": lambda module, x: x.shape[:-1].numel() * module.top_k,
    "JetMoeMoE": lambda module, x: x.shape[:-1].numel() * module.router.top_k,
}
