"""Shared experts on a second stream: for every family, nobody looks at their output before the streams join."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import monde
from monde.executors.decode import MAX_DECODE_TOKENS
from monde.models.beside import Block, Order, order_of, run_shared_beside
from monde.models.experts import find_experts
from tests.models.animals import Animal
from tests.models.oracle import ask
from tests.models.zoo import EVERY_ANIMAL, build, example_inputs

SHARED_FIRST = "afmoe ernie4_5_moe hunyuan_v1_moe laguna minimax_m3_vl qwen2_moe qwen3_5_moe qwen3_next qwen4_exp step3p7"
ROUTED_FIRST = (
    "bailing_hybrid dots3_note flint kolibri1 mistral_large4 unlimited_ocr "
    "aria axk1 axk2 deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1 exaone_moe glm4_moe glm4_moe_lite "
    "glm4v_moe glm5_next glm_moe_dsa hy_v3 hy_v4 kimi_linear mistral4 solar_open"
)
WANTED = dict.fromkeys(SHARED_FIRST.split(), Order.SHARED_FIRST)
WANTED |= dict.fromkeys(ROUTED_FIRST.split(), Order.ROUTED_FIRST)


class LateSide:
    """Nothing is there before the join: what `run` gives is NaN until then."""

    device_type = "cpu"

    def __init__(self) -> None:
        self._late: list[tuple[Tensor, Tensor]] = []
        self.num_runs = self.num_joins = 0

    def run(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = work(x)
        late = torch.full_like(y, torch.nan)
        self._late.append((late, y))
        self.num_runs += 1
        return late

    def join(self) -> None:
        for late, y in self._late:
            late.copy_(y)
        self._late.clear()
        self.num_joins += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> LateSide:
        return self


@pytest.mark.parametrize("animal", EVERY_ANIMAL)
@torch.no_grad()
def test_every_family_answers_the_same(animal: Animal) -> None:
    model, inputs = build(animal), example_inputs(animal)
    wanted = ask(model, animal, inputs)
    side = LateSide()
    orders = set(run_shared_beside(model, find_experts(model), side).values())
    assert (animal.family in WANTED) == bool(orders - {Order.AS_IS})
    got = ask(model, animal, inputs)
    assert torch.equal(got.prefill, wanted.prefill)
    if wanted.decode is not None:
        assert got.decode is not None
        assert torch.equal(got.decode, wanted.decode)
    if animal.family in WANTED:
        assert WANTED[animal.family] in orders
        assert side.num_joins >= side.num_runs > 0


@torch.no_grad()
def test_a_compiled_model_keeps_its_order() -> None:
    animal = Animal("glm4_moe", "Glm4MoeForCausalLM")
    model, inputs = build(animal), example_inputs(animal)
    modules, side = find_experts(model), LateSide()
    offloaded = monde.offload(model, device="cpu")
    run_shared_beside(offloaded, modules, side)
    wanted, num_runs = offloaded(**inputs).logits, side.num_runs
    assert num_runs > 0
    compiled = torch.compile(offloaded, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, wanted)
    assert side.num_runs == num_runs


class Shared(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8, bias=False)


class Routed(nn.Module):
    """Experts of a block under test: they multiply by two."""

    def forward(self, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        return 2 * x_TD


class Moe(nn.Module):
    """A block as models write it; subclasses differ in what comes when."""

    def __init__(self) -> None:
        super().__init__()
        self.routed, self.shared = Routed(), Shared()

    def ids(self, x: Tensor) -> Tensor:
        return torch.zeros(x.numel() // 8, 1, dtype=torch.int64)


class SharedFirst(Moe):
    def forward(self, x: Tensor) -> Tensor:
        s = self.shared(x.view(-1, 8)).view(x.shape)
        return self.routed(x.view(-1, 8), self.ids(x)).view(x.shape) + s


class RoutedFirst(Moe):
    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x.view(-1, 8), self.ids(x)).view(x.shape) + self.shared(x)


class ReadsTooEarly(Moe):
    def forward(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.shared(x))
        return self.routed(x.view(-1, 8), self.ids(x)).view(x.shape) + s


class WritesOutput(Moe):
    def forward(self, x: Tensor) -> Tensor:
        s = self.shared(x).mul_(2)
        return self.routed(x.view(-1, 8), self.ids(x)).view(x.shape) + s


class WritesInput(Moe):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        s = self.shared(x)
        x.mul_(2)
        return self.routed(x.view(-1, 8), self.ids(x)).view(x.shape) + s


class WritesBetween(Moe):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        y = self.routed(x.view(-1, 8), self.ids(x)).view(x.shape)
        return y + self.shared(x.mul_(2))


class OtherInput(Moe):
    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x.view(-1, 8), self.ids(x)).view(x.shape) + self.shared(x + 1)


class Twice(Moe):
    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.routed(x.view(-1, 8), self.ids(x)).view(x.shape)) + self.shared(x)


class NeedsMore(Moe):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.shared(x)


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        (SharedFirst, Order.SHARED_FIRST),
        (RoutedFirst, Order.ROUTED_FIRST),
        (ReadsTooEarly, Order.AS_IS),
        (WritesOutput, Order.AS_IS),
        (WritesInput, Order.AS_IS),
        (WritesBetween, Order.AS_IS),
        (OtherInput, Order.AS_IS),
        (Twice, Order.AS_IS),
        (NeedsMore, Order.AS_IS),
    ],
)
def test_order_is_found_by_trying(kind: type[Moe], order: Order) -> None:
    block = kind()
    before = dict(block.routed.__dict__), dict(block.shared.__dict__)
    assert order_of(block, block.routed, block.shared, 8) is order
    assert (dict(block.routed.__dict__), dict(block.shared.__dict__)) == before


@torch.no_grad()
@pytest.mark.parametrize("kind", [SharedFirst, RoutedFirst])
def test_long_prompts_and_copies(kind: type[Moe]) -> None:
    block, side = kind(), LateSide()
    plain = copy.deepcopy(block)
    Block(side, order_of(block, block.routed, block.shared, 8), block.routed, block.shared)
    twin = copy.deepcopy(block)
    twin.shared.weight.mul_(4)
    for num_tokens, num_runs in ((MAX_DECODE_TOKENS, 1), (MAX_DECODE_TOKENS + 1, 0), (1, 1)):
        x = torch.randn(1, num_tokens, 8)
        runs_before = side.num_runs
        assert torch.equal(block(x), plain(x))
        assert side.num_runs - runs_before == num_runs
        assert torch.equal(twin(x), 2 * x + 4 * plain.shared(x))


@torch.no_grad()
def test_after_an_error_nothing_old_is_taken() -> None:
    block, side = RoutedFirst(), LateSide()
    Block(side, Order.ROUTED_FIRST, block.routed, block.shared)
    x = torch.randn(1, 2, 8)
    block.routed.forward = None  # type: ignore[assignment]  # calling it raises
    with pytest.raises(TypeError):
        block(x)
    del block.routed.forward
    x.add_(1)
    assert torch.equal(block(x), 2 * x + nn.Linear.forward(block.shared, x))


@torch.no_grad()
def test_threads_do_not_take_each_others() -> None:
    block = RoutedFirst()
    failures: list[int] = []

    class Now(LateSide):
        def run(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return work(x)

        def join(self) -> None: ...

    plain = copy.deepcopy(block)
    Block(Now(), Order.ROUTED_FIRST, block.routed, block.shared)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x = torch.randn(1, 2, 8, generator=generator)
            if not torch.equal(block(x), plain(x)):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
