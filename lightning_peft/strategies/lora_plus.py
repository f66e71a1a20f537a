"""LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354): B learns faster than A.

``η_B = λ η_A`` with λ > 1, since in a wide model one rate for both leaves A or B behind. The
configured rate is A's. A schedule multiplies the rates of all groups alike, so the ratio stays.

As in the authors' code and in PEFT, vectors (a bias or a norm among ``modules_to_save``) learn at
B's rate and other matrices at A's. Their group of its own for adapters on embeddings has nothing to
hold here, where linears alone are adapted.

Deviations: the authors leave biases and layer norms out of weight decay. Here every group has the
configured decay, so that a comparison with LoRA differs in the rates alone.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.errors import UserError
from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.signatures import MakeOptimizer, NamedParameters


class LoRAPlus(AdapterStrategy):
    """LoRA with a learning rate of its own for B.

    In a plain loop take the optimizer of :meth:`make_optimizer`, which has the two rates.

    Args:
        r: Rank.
        lr_ratio: λ, B's learning rate divided by A's. A's should be somewhat below that of LoRA.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If ``lr_ratio`` is not a finite number above zero; when the optimizer is made, if
            it has no learning rate.
    """

    def __init__(self, r: int = 8, lr_ratio: float = 16.0, **lora: Any) -> None:
        super().__init__(r=r, **lora)
        if not 0 < lr_ratio < math.inf:
            raise UserError(f"lr_ratio must be a finite number above zero, got {lr_ratio}.")
        self.lr_ratio = lr_ratio

    def optimizer(self, named_parameters: NamedParameters, default: MakeOptimizer) -> Optimizer:
        """The configured optimizer with two groups: A's, and B's with the higher rate."""
        fast = self._columns()
        slow_group: list[nn.Parameter] = []
        fast_group: list[nn.Parameter] = []
        for _, parameter in named_parameters:
            faster = id(parameter) in fast or len(distributed.shape(parameter)) == 1
            (fast_group if faster else slow_group).append(parameter)
        groups = [{"params": group} for group in (slow_group, fast_group) if group]
        optimizer = default(groups)
        if fast_group:
            group = optimizer.param_groups[-1]
            if group.get("lr") is None:
                raise UserError(
                    f"LoRAPlus multiplies a learning rate, and model.optimizer "
                    f"({type(optimizer).__name__}) has none; give it lr."
                )
            group["lr"] = group["lr"] * self.lr_ratio  # not in place: a tensor may be all groups'
        return optimizer

    def _columns(self) -> set[int]:
        """Ids of the matrices whose columns are the components: B, in every layer."""
        assert self.model is not None
        layers = adapter_layers(self.model).values()
        return {id(matrix) for layer in layers for matrix, dim in layer.components() if dim == 1}
