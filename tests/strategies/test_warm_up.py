"""Part of an update taken back is a smaller learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.strategies.warm_up import WarmUp

OPTIMIZERS: list[Callable[..., Any]] = [
    lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    lambda p, lr: torch.optim.AdamW(p, lr=lr, amsgrad=True),
]


def gradient(step: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("dim", [0, 1])
def test_new_components_step_as_with_a_learning_rate_of_their_own(
    make: Callable[..., Any], dim: int
) -> None:
    start = gradient(99)
    parameter = nn.Parameter(start.clone())
    optimizer, warm_up = make([parameter], 0.1), WarmUp(4)
    # One parameter for each component, whose learning rate is its own.
    alone = [nn.Parameter(part.clone()) for part in start.unbind(dim)]
    optimizers = [make([p], 0.1) for p in alone]
    for step in range(12):
        if step == 3:
            warm_up.begin("p", 1, 3, step)
        parameter.grad = gradient(step)
        warm_up.before("p", parameter, dim, rank=3, step=step)
        optimizer.step()
        warm_up.after()
        rises = {3: 0.0, 4: 0.0, 5: 0.25, 6: 0.5, 7: 0.75}
        for index, (p, own) in enumerate(zip(alone, optimizers, strict=True)):
            own.param_groups[0]["lr"] = 0.1 * (rises.get(step, 1.0) if index in (1, 2) else 1.0)
            p.grad = gradient(step).select(dim, index).clone()
            own.step()
        torch.testing.assert_close(parameter, torch.stack(list(alone), dim))
    assert warm_up.born == {}


def test_what_is_old_keeps_its_bits() -> None:
    one, other = (nn.Parameter(gradient(99).clone()) for _ in range(2))
    warm_up = WarmUp(4)
    warm_up.begin("p", 2, 3, 0)
    for step in range(4):
        for p in (one, other):
            p.grad = gradient(step)
            if p is one:
                warm_up.before("p", p, 0, rank=3, step=step)
            torch.optim.SGD([p], lr=0.1).step()
            warm_up.after()
    assert torch.equal(one[:2], other[:2])
    assert not torch.equal(one[2], other[2])


def test_components_that_have_gone_are_forgotten() -> None:
    warm_up = WarmUp(4)
    warm_up.begin("p", 1, 3, 0)
    warm_up.before("p", nn.Parameter(torch.zeros(3, 4)), 0, rank=2, step=1)
    assert warm_up.born == {"p": {1: 0}}


def test_without_steps_nothing_is_held() -> None:
    warm_up = WarmUp(0)
    warm_up.begin("p", 1, 3, 0)
    assert warm_up.born == {}
