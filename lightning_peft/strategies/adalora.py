"""AdaLoRA (Zhang et al. 2023, https://arxiv.org/abs/2303.10512): a budget of ranks over all layers.

``ΔW = s P Λ Q`` (equation 3) with a penalty that keeps P and Q orthogonal (equation 4). After each
step the importance of every component is updated (smoothed sensitivity × uncertainty of its
values); every ``deltaT`` steps those outside the budget have their singular value set to zero, from
where they may come back. When the budget is final, ``tfinal`` steps before the end, components
outside it are removed for real; the authors' code, and PEFT's, keep them at zero (and go on with
their part of the penalty). Nothing has to be called by the user.

Deviations: the scaling is lora_alpha / r, where PEFT divides by r + 1e-5.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.adapters.attach import AttachReport, lora_layers
from lightning_peft.adapters.gates import RankScale, chain
from lightning_peft.adapters.growth import match_ranks
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.shrink import check_gates, keep_components
from lightning_peft.errors import UserError
from lightning_peft.pruning import sensitivity
from lightning_peft.pruning.allotment import even_ranks
from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.hooks import say_if_too_short, steps_of
from lightning_peft.strategies.triplets import TripletImportance, orthogonality_penalty, triplet


class AdaLoRA(AdapterStrategy):
    """LoRA in the form of a singular value decomposition, under a falling budget of components.

    Args:
        r: Initial rank of every layer, 1.5 times the target in the paper.
        target_r: Final rank, on average over the layers.
        tinit: Optimizer steps before the budget begins to fall.
        tfinal: Optimizer steps at the end, with the final ranks.
        deltaT: Optimizer steps between two allocations.
        beta1: Smoothing of the sensitivity, in (0, 1).
        beta2: Smoothing of its uncertainty, in (0, 1).
        orth_reg_weight: Weight of the penalty, averaged over the matrices.
        total_step: Optimizer steps of the run; the trainer's when None.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range.
    """

    needs = frozenset({"whole weights", "whole steps"})
    changes_ranks = True

    def __init__(
        self,
        r: int = 12,
        target_r: int = 8,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,  # noqa: N803 - PEFT's name
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
        total_step: int | None = None,
        **lora: Any,
    ) -> None:
        super().__init__(r=r, **lora)
        if not 1 <= target_r <= r:
            raise UserError(f"target_r must lie between 1 and r = {r}, got {target_r}.")
        for key, count, least in (
            ("tinit", tinit, 0),
            ("tfinal", tfinal, 0),
            ("deltaT", deltaT, 1),
        ):
            if count < least:
                raise UserError(f"{key} must be at least {least}, got {count}.")
        for key, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise UserError(f"{key} must lie in (0, 1), got {beta}.")
        self.target_r, self.tinit, self.tfinal, self.deltaT = target_r, tinit, tfinal, deltaT
        self.beta1, self.beta2, self.orth_reg_weight = beta1, beta2, orth_reg_weight
        self.total_step = total_step
        self._check_schedule()
        self.averages = TripletImportance(beta1, beta2)

    def _check_schedule(self) -> None:
        if self.total_step is not None and self.tinit + self.tfinal >= self.total_step:
            raise UserError(
                f"tinit + tfinal must be below total_step = {self.total_step}, so that the budget "
                f"can fall between them, got {self.tinit} + {self.tfinal}."
            )

    @property
    def _final_step(self) -> int:
        assert self.total_step is not None
        return min(self.total_step - self.tfinal, self.total_step - 1)

    def gate(self, r: int) -> nn.Module:
        """The singular values Λ, before what every strategy may have there."""
        return chain(RankScale(r, 0.0), super().gate(r))

    def initialize(self, layer: LoRALinear) -> None:
        """P and Q normal with standard deviation 0.02, Λ zero."""
        for matrix, _ in layer.components():
            if not matrix.is_meta:
                nn.init.normal_(matrix, std=0.02)

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach, and refuse a ``rank_gate`` that cannot lose components."""
        report = super().attach(model, initialize)
        check_gates(lora_layers(model).values())
        return report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the number of steps from the trainer."""
        super().on_train_start(trainer, pl_module)
        steps = steps_of(trainer)
        if self.total_step is None:
            self.total_step = steps
            self._check_schedule()
        else:
            done = f"AdaLoRA's budget is final by total_step = {self.total_step}"
            say_if_too_short(steps, done, self._final_step, "leave total_step out")

    def penalty(self, model: nn.Module) -> Tensor | float:
        """How far P and Q are from orthonormal ones, weighted (equation 4)."""
        return self.orth_reg_weight * orthogonality_penalty(model)

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Update the importance, and allocate the budget if this step is due."""
        super().after_step(model, optimizer, global_step)
        if self.total_step is None:
            raise UserError(
                "total_step: AdaLoRA's budget depends on the number of optimizer steps; give "
                "total_step where there is no trainer to ask."
            )
        last = self.total_step - self.tfinal
        layers = lora_layers(model)
        if global_step > self._final_step or not layers:
            return
        if global_step < last:
            self.averages.update(layers)
        final = global_step == self._final_step
        if final or (global_step > self.tinit and global_step % self.deltaT == 0):
            self._allocate(layers, optimizer, global_step, final)

    def _allocate(
        self, layers: dict[str, LoRALinear], optimizer: Optimizer, step: int, final: bool
    ) -> None:
        assert self.total_step is not None
        scores = [self.averages.score(name) for name in layers]
        budget = sensitivity.cubic_budget(
            self.total_step if final else step,
            sum(layer.r for layer in layers.values()),
            self.target_r * len(layers),
            self.tinit,
            self.tfinal,
            self.total_step,
        )
        kept = sensitivity.above_budget(scores, budget)
        for (name, layer), keep in zip(layers.items(), kept, strict=True):
            triplet(layer)["values"].masked_fill_(~keep, 0.0)
            if final:
                if not keep.all():
                    keep_components(layer, keep.nonzero()[:, 0], optimizer)
                self.note(step, name, "allocated", layer.rank)
        if final:
            self.averages.clear()

    def final_parameters(self, model: nn.Module) -> int:
        """The count of ``target_r`` components for each layer; see :func:`even_ranks`."""
        layers = lora_layers(model).values()
        ranks = even_ranks([layer.rank for layer in layers], self.target_r * len(layers))
        match_ranks(zip(layers, ranks, strict=True))
        return super().final_parameters(model)  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """Decisions and the smoothed importance."""
        return {**super().state_dict(), "averages": self.averages.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self.averages.restore(state_dict["averages"])
