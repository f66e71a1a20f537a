"""What all keepers have from their base."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_peft.distributed.keeper import Keeper
from lightning_peft.distributed.whole import Whole


def test_a_moment_begins_with_zeros_and_only_once() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([parameter])
    keeper = Whole(parameter)
    keeper.begin_moment(optimizer, "exp_avg", torch.float64)
    begun = optimizer.state[parameter]["exp_avg"]
    assert torch.equal(begun, torch.zeros(2, 3, dtype=torch.float64))
    assert not begun.requires_grad
    keeper.begin_moment(optimizer, "exp_avg", torch.float32)
    assert optimizer.state[parameter]["exp_avg"] is begun
    assert keeper.state(optimizer) is optimizer.state[parameter]


def test_counters_lie_where_the_optimizer_has_them() -> None:
    parameter = nn.Parameter(torch.ones(2))
    steps = torch.tensor(3, dtype=torch.int64)
    for fused, dtype in ((True, torch.float32), (False, torch.int64)):
        optimizer = torch.optim.AdamW([parameter], fused=fused)
        keeper = Whole(parameter)
        keeper.write_counter(optimizer, "step", steps)
        keeper.write_counter(optimizer, "name", "a")
        found: Any = keeper.counters(optimizer)
        assert (found["step"].dtype, int(found["step"]), found["name"]) == (dtype, 3, "a")
        assert found["step"] is not steps


def test_by_default_an_engine_leaves_optimizers_and_reading_as_they_are() -> None:
    model = nn.Linear(2, 2)
    assert Keeper.groups(torch.optim.SGD(model.parameters())) is None
    with Keeper.gathered(model, [*model.parameters()]) as nothing:
        assert nothing is None
    assert (Keeper.plain, Keeper.is_cut) == (False, False)
    assert Whole(model.weight).shape() == (2, 2)
