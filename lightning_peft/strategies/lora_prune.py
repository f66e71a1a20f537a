"""LoRAPrune (Zhang et al. 2023, https://arxiv.org/abs/2305.18403): the base gets smaller too.

Heads and MLP channels leave the frozen model while LoRA trains, by what the adapters' gradients say
of them: ``|(∂L/∂B A + B ∂L/∂A - ∂L/∂B ∂L/∂A) ⊙ (W + s B A)|``, summed over a group's rows or
columns of each matrix, divided by the norm over groups, summed over the matrices, and smoothed at
each step, ``I ← λ I + (1 - λ) I_now``. So computes the authors' code (aim-uofa/LoRAPrune).

Deviations from that code: rows and columns leave for real at each removal, where it masks them and
cuts at the end; so the norm is over the groups that are left. A group of heads is a key/value head
with all its query heads (it knows no grouped queries). All layers lose as many groups, since a
configuration of transformers has one number for all; there the first tenth and the last lose none.
Every linear has an adapter by default, there four of seven; one without is cut, and has no part in
the importance. Gradients are seen before clipping, there after it. The cubic schedule is the same,
given in steps and not in parts of a run.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.adapters.attach import AttachReport, lora_layers
from lightning_peft.adapters.dense import dense_weight
from lightning_peft.adapters.groups import Groups
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.errors import UserError
from lightning_peft.pruning import lora_prune
from lightning_peft.strategies.pruned_base import PrunedBase


class LoRAPrune(PrunedBase):
    """LoRA over a base that loses the heads and MLP channels that matter least to the adapters.

    Args:
        r: Rank.
        smoothing: Of the importance over steps, λ, in [0, 1).
        pruning: The arguments of :class:`PrunedBase`, and those that all strategies share.

    Raises:
        UserError: If a number lies outside its range.
    """

    def __init__(self, r: int = 8, smoothing: float = 0.9, **pruning: Any) -> None:
        super().__init__(r=r, **pruning)
        if not 0 <= smoothing < 1:
            raise UserError(f"smoothing must lie in [0, 1), got {smoothing}.")
        self.smoothing = smoothing
        self.importance: dict[str, Tensor] = {}

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach, and refuse groups of which no gradient would tell anything."""
        report = super().attach(model, initialize)
        layers = lora_layers(model)
        for name in self.excess():
            members = [member.name for member in self.groups[name].members]
            if not layers.keys() & members:
                raise UserError(
                    f"target_modules: {name} is to lose {self.groups[name].kind} by the gradients "
                    f"of its adapters, and has none; add {members[-1].rpartition('.')[2]}."
                )
        return report

    def before_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Look at this step's gradients, and remove groups if it is due."""
        pruned = self.excess()
        if not pruned:
            self.importance.clear()
            return
        layers = lora_layers(model)
        now = {name: _importance(self.groups[name], layers) for name in pruned}
        finite = torch.stack([value.isfinite().all() for value in now.values()]).all()
        for name, value in now.items():
            old = self.importance.get(name, torch.zeros_like(value)).to(value)
            new = self.smoothing * old + (1 - self.smoothing) * value
            self.importance[name] = torch.where(finite, new, old)  # not read: that would wait
        if not self.due(global_step):
            return
        if not finite:  # a step that a gradient scaler skips, or one that ends the run
            rank_zero_warn(
                f"nothing was removed at step {global_step}, since its gradients are not finite; "
                "it leaves one removal later."
            )
            return
        for name, stay in self.remove(model, optimizer, global_step, self.importance).items():
            self.importance[name] = self.importance[name][stay]

    def state_dict(self) -> dict[str, Any]:
        """Decisions, what is left of the base, and what that is worth so far."""
        importance = {name: value.cpu() for name, value in self.importance.items()}
        return {**super().state_dict(), "importance": importance}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self.importance = dict(state_dict["importance"])


@torch.no_grad()
def _importance(groups: Groups, layers: dict[str, LoRALinear]) -> Tensor:
    """By this step's gradients, (groups,)."""
    found = []
    for member in groups.members:
        if (layer := layers.get(member.name)) is not None:
            weight = layer.merged_weight(dense_weight(layer.base))
            values = lora_prune.score(weight, *layer.whole(), *layer.whole_gradients())
            sums = lora_prune.sum_of_groups(values, member.dim, member.size)
            found.append(lora_prune.normalized(sums))
    return torch.stack(found).sum(0)
