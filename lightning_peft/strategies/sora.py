"""SoRA (Ding et al. 2023, https://arxiv.org/abs/2311.11696): ranks by a sparse gate.

``ΔW = s B diag(g) A`` with an ℓ1 penalty on the gate g, of weight λ, which is met by a proximal
step after each optimizer step: ``g ← sign(g) max(|g| - ηλ, 0)`` with the gate's own learning rate
η. A gate that is exactly zero has a gradient still and may come back, until its component is
removed: at the end, as in the paper, or every ``remove_every`` steps too. Adam's steps are about η
or shorter, so from λ = 1 on hardly any comes back, or grows.

Deviations from the authors' code (TsinghuaC3I/SoRA), which differs from the formula above:

* Its threshold is a constant, 3e-4 in its script, and does not follow the learning rate (another
  file of it, unused, multiplies by it). The default λ makes the two equal at the script's highest
  rate, 8e-4.
* It thresholds in place, one assignment after another, and so zeroes all below twice the threshold.
* Its script adds 10 times the mean |g| to the loss too, which counts the penalty twice; left out
  here.
* Its optional schedule, which goes on training under one larger threshold after another, is left
  out here.

As there, g starts normal, and has no weight decay.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.attach import AttachReport, lora_layers
from lightning_peft.adapters.gates import RankScale, chain, rank_scale
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.shrink import check_gates, keep_components
from lightning_peft.errors import UserError
from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.hooks import steps_of
from lightning_peft.strategies.signatures import MakeOptimizer, NamedParameters


class SoRA(AdapterStrategy):
    """LoRA with a trained gate between A and B that a proximal step makes sparse.

    Args:
        r: Rank at the start.
        l1_weight: λ, the weight of the gates' ℓ1 norm.
        gate_lr: Learning rate of the gates; the configured one when None.
        remove_every: Optimizer steps between removals of components whose gate is zero; None for
            the end of the run only, so that each may come back until then.
        total_step: Optimizer steps of the run; the trainer's when None. Where there is no trainer
            either, call :meth:`remove` at the end.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range; at a step, if the optimizer does not train
            the gates.
    """

    needs = frozenset({"whole weights", "whole steps"})
    changes_ranks = True

    def __init__(
        self,
        r: int = 8,
        l1_weight: float = 0.375,
        gate_lr: float | None = None,
        remove_every: int | None = None,
        total_step: int | None = None,
        **lora: Any,
    ) -> None:
        super().__init__(r=r, **lora)
        for key, value in (("l1_weight", l1_weight), ("gate_lr", gate_lr)):
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{key} must be a finite number of at least 0, got {value}.")
        for key, count in (("remove_every", remove_every), ("total_step", total_step)):
            if count is not None and count < 1:
                raise UserError(f"{key} must be at least 1, got {count}.")
        self.l1_weight, self.gate_lr = l1_weight, gate_lr
        self.remove_every, self.total_step = remove_every, total_step
        # Of the step that is being made: when after_step is called a scheduler may have moved on.
        self._rates: dict[str, float] = {}

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach, and refuse a ``rank_gate`` that cannot lose components."""
        report = super().attach(model, initialize)
        check_gates(lora_layers(model).values())
        return report

    def gate(self, r: int) -> nn.Module:
        """The gate g, before what every strategy may have there."""
        return chain(RankScale(r, 1.0), super().gate(r))

    def initialize(self, layer: LoRALinear) -> None:
        """A and B as in LoRA, g standard normal."""
        super().initialize(layer)
        if not _values(layer).is_meta:
            nn.init.normal_(_values(layer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the number of steps from the trainer, where it has one."""
        super().on_train_start(trainer, pl_module)
        if self.total_step is None:
            self.total_step = steps_of(trainer)

    def optimizer(self, named_parameters: NamedParameters, default: MakeOptimizer) -> Optimizer:
        """The configured one, with the gates in a group without weight decay."""
        assert self.model is not None
        gates = {id(_values(layer)) for layer in lora_layers(self.model).values()}
        params = [parameter for _, parameter in named_parameters]
        own: dict[str, Any] = {"params": [p for p in params if id(p) in gates], "weight_decay": 0.0}
        if self.gate_lr is not None:
            own["lr"] = self.gate_lr
        return default([{"params": [p for p in params if id(p) not in gates]}, own])

    def before_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Note the gates' learning rate."""
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, layer in lora_layers(model).items():
            if id(_values(layer)) not in rates:
                raise UserError(
                    f"the optimizer does not train SoRA's gates, such as {name}'s, whose learning "
                    "rate the proximal step needs; make it by strategy.make_optimizer, or from all "
                    "parameters that train."
                )
            self._rates[name] = float(rates[id(_values(layer))])

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Make the proximal step, and remove what is zero if that is due."""
        super().after_step(model, optimizer, global_step)
        for name, layer in lora_layers(model).items():
            values = _values(layer)
            values.copy_(F.softshrink(values, self._rates[name] * self.l1_weight))
        done = global_step + 1
        if done == self.total_step or (self.remove_every and done % self.remove_every == 0):
            self.remove(model, optimizer, global_step)

    @torch.no_grad()
    def remove(self, model: nn.Module, optimizer: Optimizer | None, global_step: int) -> None:
        """Remove the components whose gate is zero; the model's function stays what it is.

        Args:
            model: The adapted model.
            optimizer: Whose moments follow; None where training is over.
            global_step: The optimizer step, 0-based, for the record.
        """
        layers = lora_layers(model)
        kept = {n: _values(layer)[: layer.rank].nonzero()[:, 0] for n, layer in layers.items()}
        decided = {name: indices.tolist() for name, indices in kept.items()}
        distributed.assert_agreement(global_step, decided, "the components to keep")
        for name, layer in layers.items():
            if len(kept[name]) < layer.rank:
                keep_components(layer, kept[name], optimizer)
                self.note(global_step, name, "removed", layer.rank)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what is zero where a run ends at another step than was expected."""
        if self.model is not None:
            self.remove(self.model, trainer.optimizers[0], trainer.global_step - 1)

    def final_parameters(self, model: nn.Module) -> None:
        """None: which gates become zero is for the data to say."""
        return


def _values(layer: LoRALinear) -> Tensor:
    return rank_scale(layer.gate).values
