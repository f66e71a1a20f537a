"""Growth is real: values, gradients and moments grow together, and what was there stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters import LoRALinear, add_components, keep_components
from lightning_peft.adapters.gates import RankScale
from lightning_peft.adapters.growth import match_ranks
from lightning_peft.errors import UserError
from lightning_peft.strategies import StepMask

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def make_layer(r: int = 2, max_r: int = 8, gate: nn.Module | None = None) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(7, 6), r, 2.0 * max(r, 1), gate=gate, max_r=max_r)
    layer.reset_parameters(False)
    layer.base.requires_grad_(False)
    return layer


def trained(layer: LoRALinear) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def step(layer: LoRALinear, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    loss = (layer(x) - x[:, :6].cos()).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def new(count: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 7, generator=generator), torch.randn(6, count, generator=generator)


@pytest.mark.parametrize("gate", [None, RankScale(2, 0.5), StepMask(2, p=0.0)])
@torch.no_grad()
def test_the_function_changes_by_what_was_added(gate: nn.Module | None) -> None:
    layer, x = make_layer(gate=gate), torch.randn(20, 7)
    before, (A, B) = layer(x), new(3)
    add_components(layer, A, B)
    assert layer.rank == 5
    torch.testing.assert_close(layer(x), before + layer.scaling * x @ A.T @ B.T)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_parameters_gradients_and_moments_grow_together(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    layer = make_layer()
    optimizer = make(trained(layer))
    for seed in range(2):
        step(layer, optimizer, seed)
    before = {
        p: (p.detach().clone(), p.grad.clone(), dict(optimizer.state[p]))  # type: ignore[union-attr]
        for p in (layer.lora_A, layer.lora_B)
    }
    add_components(layer, *new(3), optimizer)
    assert optimizer.param_groups[0]["params"] == [layer.lora_A, layer.lora_B]
    for (parameter, dim), added in zip(layer.components(), new(3), strict=True):
        value, grad, state = before[parameter]
        assert torch.equal(parameter, torch.cat([value, added], dim))
        assert torch.equal(parameter.grad, torch.cat([grad, added * 0], dim))  # type: ignore[arg-type]
        for key, old in state.items():
            found = optimizer.state[parameter][key]
            expected = torch.cat([old, added * 0], dim) if old.dim() else old
            assert torch.equal(found, expected), key
    assert step(layer, optimizer, 5).isfinite()


def test_moments_can_be_given() -> None:
    layer = make_layer()
    optimizer = torch.optim.AdamW(trained(layer))
    step(layer, optimizer, 0)
    add_components(layer, *new(1), optimizer, moments={"exp_avg": new(1, seed=9)})
    assert torch.equal(optimizer.state[layer.lora_A]["exp_avg"][2:], new(1, seed=9)[0])
    assert torch.equal(optimizer.state[layer.lora_B]["exp_avg"][:, 2:], new(1, seed=9)[1])
    assert not optimizer.state[layer.lora_A]["exp_avg_sq"][2:].any()


def test_a_layer_may_begin_at_rank_zero_and_get_its_first_component() -> None:
    layer, x = make_layer(r=0, max_r=2), torch.randn(4, 7)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base(x))
    optimizer = torch.optim.AdamW(trained(layer), lr=0.05)
    step(layer, optimizer, 0)
    add_components(layer, *new(2), optimizer)
    first = [step(layer, optimizer, 1) for _ in range(30)]
    assert first[-1] < first[0]


class Masked:
    """The independent one: full-size matrices, of which a mask says what lives."""

    def __init__(self, layer: LoRALinear, width: int) -> None:
        self.base, self.scaling, self.width = layer.base, layer.scaling, width
        self.A = nn.Parameter(torch.zeros(width, 7))
        self.B = nn.Parameter(torch.zeros(6, width))
        self.slots = list(range(layer.rank))
        with torch.no_grad():
            self.A[: layer.rank] = layer.active_A
            self.B[:, : layer.rank] = layer.active_B
        self.optimizer = torch.optim.AdamW([self.A, self.B], lr=0.02)

    def step(self, seed: int) -> None:
        x = torch.randn(20, 7, generator=torch.Generator().manual_seed(seed))
        mask = torch.zeros(self.width).index_fill(0, torch.tensor(self.slots), 1.0)
        y = self.base(x) + self.scaling * F.linear(F.linear(x, self.A) * mask, self.B)
        self.optimizer.zero_grad()
        (y - x[:, :6].cos()).square().mean().backward()
        self.optimizer.step()

    @torch.no_grad()
    def set_slot(self, slot: int, a: Tensor, b: Tensor) -> None:
        self.A[slot], self.B[:, slot] = a, b
        for parameter, where in ((self.A, slot), (self.B, (slice(None), slot))):
            for key in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    self.optimizer.state[parameter][key][where] = 0.0


@pytest.mark.parametrize("resize", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_hundreds_of_random_changes_agree_with_masked_matrices(seed: int, resize: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    draw = lambda n: int(torch.randint(n, (1,), generator=rng))  # noqa: E731
    layer = make_layer(r=3, max_r=9)
    if not resize:  # as under an engine: the width is made once
        wide = make_layer(r=9, max_r=9)
        with torch.no_grad():
            wide.lora_A[:3], wide.lora_B[:, :3] = layer.lora_A, layer.lora_B
        wide.base, wide.scaling = layer.base, layer.scaling
        layer = wide
        keep_components(layer, torch.arange(3), resize=False)
    plain = Masked(layer, 9)
    optimizer = torch.optim.AdamW(trained(layer), lr=0.02)
    for number in range(300):
        step(layer, optimizer, number)
        plain.step(number)
        if number % 3 == 0 and layer.rank > 1:
            kept = sorted(
                torch.randperm(layer.rank, generator=rng)[: 1 + draw(layer.rank)].tolist()
            )
            keep_components(layer, torch.tensor(kept), optimizer, resize=resize)
            for gone in set(range(len(plain.slots))) - set(kept):
                plain.set_slot(plain.slots[gone], torch.zeros(7), torch.zeros(6))
            plain.slots = [plain.slots[i] for i in kept]
        elif number % 3 == 1 and layer.rank < 9:
            count = 1 + draw(9 - layer.rank)
            A, B = new(count, seed=number)
            add_components(layer, 0.3 * A, 0.3 * B, optimizer, resize=resize)
            free = [slot for slot in range(9) if slot not in plain.slots][:count]
            for i, slot in enumerate(free):
                plain.set_slot(slot, 0.3 * A[i], 0.3 * B[:, i])
            plain.slots += free
        assert layer.rank == len(plain.slots)
        assert layer.lora_A.shape[0] == (layer.rank if resize else 9)
    torch.testing.assert_close(layer.active_A, plain.A[plain.slots], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.active_B, plain.B[:, plain.slots], rtol=1e-3, atol=1e-4)


def test_saved_ranks_are_taken_up_to_the_most() -> None:
    layer = make_layer(gate=RankScale(2, 0.5))
    match_ranks([(layer, 6)])
    assert layer.rank == 6
    assert layer.lora_B.shape == (6, 6)
    assert layer.gate.values.shape == (6,)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"^a saved rank of 9 does not fit a layer of rank 8\.$"):
        match_ranks([(layer, 9)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda layer: add_components(layer, *new(7)),
            "7 more components would give a layer of rank 2 more than its max_r of 8.",
        ),
        (
            lambda layer: add_components(layer, new(2)[0], new(1)[1]),
            "A_new (2, 7) and B_new (6, 1) must be (k, 7) and (6, k).",
        ),
        (
            lambda layer: add_components(layer, new(1)[0] / 0, new(1)[1]),
            "new components hold NaN or infinite values.",
        ),
        (
            lambda layer: add_components(layer, new(1)[0].double() * 1e39, new(1)[1]),
            "new components hold NaN or infinite values.",
        ),
        (
            lambda layer: add_components(layer, *new(1), resize=False),
            "a layer of rank 2 has room for 0 more components, not for 1: an engine of several "
            "processes keeps sizes, so make the layer with max_r=3 or more.",
        ),
    ],
)
def test_what_cannot_be_added_is_said_and_nothing_is_changed(
    change: Callable[[LoRALinear], None], said: str
) -> None:
    layer = make_layer()
    before = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(UserError) as error:
        change(layer)
    assert str(error.value) == said
    assert layer.rank == 2
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))


def test_moments_of_another_optimizer_are_refused() -> None:
    layer = make_layer()
    optimizer = torch.optim.AdamW(trained(layer))
    step(layer, optimizer, 0)
    with pytest.raises(UserError, match=r"^moments: AdamW remembers exp_avg, exp_avg_sq, not 'm'"):
        add_components(layer, *new(1), optimizer, moments={"m": new(1)})
    assert layer.lora_A.shape == (2, 7)


def test_moments_before_the_first_step_are_refused() -> None:
    layer = make_layer()
    optimizer = torch.optim.AdamW(trained(layer))
    with pytest.raises(UserError, match=r"^moments: AdamW remembers nothing yet, not 'exp_avg'\.$"):
        add_components(layer, *new(1), optimizer, moments={"exp_avg": new(1)})


def test_moments_of_another_shape_are_refused_before_anything_is_changed() -> None:
    layer = make_layer()
    optimizer = torch.optim.AdamW(trained(layer))
    step(layer, optimizer, 0)
    said = r"^moments: exp_avg must be finite and of the shapes of A_new and B_new\.$"
    for wrong in ((new(2)[0], new(1)[1]), (new(1)[0], new(2)[1]), (new(1)[0] / 0, new(1)[1])):
        with pytest.raises(UserError, match=said):
            add_components(layer, *new(1), optimizer, moments={"exp_avg": wrong})
        assert (layer.lora_A.shape, layer.lora_B.shape) == ((2, 7), (6, 2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda layer: add_components(layer, *new(1)), "added"),
        (lambda layer: keep_components(layer, torch.tensor([0])), "removed"),
    ],
)
def test_components_of_a_layer_that_shares_them_stay(
    change: Callable[[LoRALinear], None], said: str
) -> None:
    one, other = make_layer(), make_layer()
    one.share_with(other)
    for layer in (one, other):
        with pytest.raises(UserError) as error:
            change(layer)
        assert str(error.value) == (
            f"components cannot be {said} in a layer that shares them with another one."
        )


def test_a_gate_behind_the_methods_own_scale_begins_with_one() -> None:
    layer = make_layer(gate=nn.Sequential(RankScale(2, 0.5), RankScale(2, 0.7)))
    add_components(layer, *new(1), gate=0.0)
    first, second = layer.gate  # type: ignore[misc]
    torch.testing.assert_close(first.values, torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(second.values, torch.tensor([0.7, 0.7, 1.0]))
