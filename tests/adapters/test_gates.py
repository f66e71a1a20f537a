"""What may stand between A and B, and what everything else reads off it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.adapters import Gate, keep_components
from lightning_peft.adapters.gates import (
    RankScale,
    chain,
    chosen_components,
    gate_diagonal,
    rank_scale,
    step_gates,
)
from lightning_peft.strategies import StepMask


def test_a_gate_folds_into_b(filled, diagonal) -> None:
    values = torch.tensor([0.5, -2.0, 0.0])
    layer = filled(nn.Linear(7, 4), gate=diagonal(values)).eval()
    left, right = layer.factors()
    torch.testing.assert_close(left, 2 * layer.lora_B.detach() * values)
    assert torch.equal(right, layer.lora_A)
    x = torch.randn(5, 7)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ (left @ right).T)
    keep_components(layer, torch.tensor([0, 2]))
    assert torch.equal(layer.factors()[0], left[:, [0, 2]])


def test_a_mask_is_read_as_the_identity_and_stays_in_its_mode(filled) -> None:
    layer = filled(nn.Linear(7, 4), gate=StepMask(3, 0.5)).train()
    torch.testing.assert_close(layer.factors()[0], 2 * layer.lora_B.detach())
    assert layer.gate.training


class Alternating(Gate):
    """Lets every other component through, and counts steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def choose(self, rank: int) -> tuple[Tensor, float]:
        return torch.arange(0, rank, 2), 1.5

    def new_step(self) -> None:
        self.steps += 1

    def forward(self, z: Tensor) -> Tensor:
        return z * 1.5 * (torch.arange(z.shape[-1]) % 2 == 0)


class Duck(nn.Identity):
    """No Gate, but it acts at steps."""

    def new_step(self) -> None:
        pass


def test_a_gate_chooses_nothing_and_does_nothing_at_steps_by_default() -> None:
    gate = Gate()
    assert gate.choose(4) is None
    gate.new_step()
    assert step_gates(gate) == []
    assert step_gates(None) == []


def test_the_parts_that_act_at_steps_are_found_inside_of_others() -> None:
    acting, duck = Alternating(), Duck()
    gate = nn.Sequential(RankScale(3, 1.0), acting, nn.Dropout(), nn.Sequential(duck))
    assert step_gates(gate) == [acting, duck]


def test_what_a_gate_chooses_is_computed_alone_and_equals_its_forward(filled) -> None:
    layer, x = filled(nn.Linear(7, 4), r=5, gate=Alternating()), torch.randn(6, 7)
    components, factor = chosen_components(layer.gate, 5)
    assert (components.tolist(), factor) == ([0, 2, 4], 1.5)
    chosen = layer(x)
    layer.gate.register_forward_hook(lambda gate, args, z: None)
    assert chosen_components(layer.gate, 5) is None  # who watches the forward has it called
    torch.testing.assert_close(layer(x), chosen)
    assert chosen_components(None, 5) is None
    assert chosen_components(nn.Dropout(), 5) is None


def test_a_diagonal_is_read_off_in_eval_and_leaves_the_gate_as_it_was() -> None:
    scale = RankScale(3, 0.5).double()
    nn.init.constant_(scale.values[1:2], -2.0)
    gate = chain(scale, nn.Dropout(0.9)).train()
    diagonal = gate_diagonal(gate, 3)
    assert diagonal.tolist() == [0.5, -2.0, 0.5]
    assert diagonal.dtype == torch.float64
    assert not diagonal.requires_grad
    assert gate.training
    assert gate_diagonal(nn.Dropout(0.9), 2).tolist() == [1, 1]


def test_a_chain_applies_one_gate_after_another() -> None:
    scale = RankScale(2, 3.0)
    assert chain(scale, None) is scale
    both = chain(scale, nn.Sigmoid())
    assert rank_scale(both) is scale
    z = torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(both(z), (3 * z).sigmoid())


def test_a_scale_computes_with_its_front_where_dead_components_stand_behind() -> None:
    scale = RankScale(4, 1.0)
    with torch.no_grad():
        scale.values.copy_(torch.arange(4.0))
    assert scale(torch.ones(1, 3)).tolist() == [[0, 1, 2]]
