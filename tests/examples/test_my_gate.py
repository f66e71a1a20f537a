"""The gate of ``docs/new_strategy.md``."""

from __future__ import annotations

import torch

from lightning_peft.testing import check_strategy


def test_keeps_the_promises_of_a_strategy(example) -> None:
    check_strategy(example("my_gate").MyGate(r=4))


def test_the_first_components_pass_and_all_of_them_in_eval(example) -> None:
    gate, z = example("my_gate").FirstComponents(), torch.ones(2, 5)
    torch.manual_seed(0)
    counts = set()
    for _ in range(40):
        row = gate.train()(z)[0]
        count = int(row.sum())
        assert row.tolist() == [1] * count + [0] * (5 - count)
        counts.add(count)
    assert counts == {1, 2, 3, 4, 5}
    assert torch.equal(gate.eval()(z), z)
