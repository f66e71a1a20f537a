"""What an optimizer keeps after its first step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.modules.adapted import AdaptedModule


def optimizer_state(module: AdaptedModule, trained: list[nn.Parameter]) -> list[Tensor]:
    """The tensors of the optimizer's state after one step with the module's own optimizer.

    Args:
        module: With its adapted model on the meta device.
        trained: The parameters that train.
    """
    optimizer = module.adapter.make_optimizer(module.model, _on_meta(module.make_optimizer))
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    # Without the hooks of step, by which a strategy finds out that it was not called.
    step = type(optimizer).step
    getattr(step, "__wrapped__", step)(optimizer)
    for parameter in trained:
        parameter.grad = None
    found = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in found if isinstance(value, Tensor)]


def _on_meta(make: OptimizerCallable) -> OptimizerCallable:
    """An optimizer's step without its fused kernel, which meta tensors have none of."""

    def made(params: Iterable[nn.Parameter]) -> Optimizer:
        optimizer = make([nn.Parameter(torch.zeros(1))])
        if not optimizer.defaults.get("fused"):
            return make(params)
        optimizer.param_groups[0].update(params=list(params), fused=False)
        return optimizer

    return made
