"""The optimizer's state on the meta device."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_peft.estimation.memory import value_bytes
from lightning_peft.estimation.optimizer import optimizer_state
from lightning_peft.modules import CausalLMModule
from lightning_peft.strategies import LoRA


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (torch.optim.AdamW, 2),
        (partial(torch.optim.SGD, lr=0.1), 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
    ],
)
def test_state_is_the_moments_of_what_trains(optimizer, moments: int) -> None:
    module = CausalLMModule("tiny_llama", adapter=LoRA(8), optimizer=optimizer)
    trained = [nn.Parameter(torch.empty(5, 7, device="meta")), nn.Parameter(torch.empty(3))]
    module.model = nn.ParameterList(trained)
    state = optimizer_state(module, trained)
    large = [tensor for tensor in state if tensor.dim()]
    assert value_bytes(large) == moments * 4 * (5 * 7 + 3)
    assert all(parameter.grad is None for parameter in trained)


def test_a_fused_optimizer_has_the_same_state(estimated) -> None:
    fused, plain = (
        estimated(LoRA(8), optimizer=partial(torch.optim.AdamW, fused=fused))
        for fused in (True, False)
    )
    assert fused.optimizer == plain.optimizer
