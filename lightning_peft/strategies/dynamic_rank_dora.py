"""Dynamic Low-Rank Adaptation (Mao et al. 2024, https://arxiv.org/abs/2405.17357).

Its authors call it DoRA. It has nothing to do with the weight-decomposed DoRA of
:mod:`lightning_peft.strategies.dora` (2402.09353), which is what PEFT means by that name.

``ΔW = s Σ_i c_i B_i A_i``, a sum of components of rank one. Each is worth its share
``‖c_i B_i A_i‖_F / ‖ΔW / s‖_F`` of its layer, smoothed over the steps. Every ``prune_every`` steps
those outside a falling budget over all layers have c_i set to zero, from where they may come back.
When the budget is final they are removed for real; the authors' code sets them to zero after each
further step. Until then a penalty for dimensional equilibrium keeps the values of each vector A_i
and B_i alike: their mean variance.

Deviations: written after the authors' code (MIkumikumi0116/DoRA). There the part of the components
that is gone grows as p³ with the time p, so that most leave late; ``curve="early"`` is AdaLoRA's
budget, which falls as (1 - p)³. The code removes one component at the first decision, where p is 0;
here none.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.attach import AttachReport, lora_layers
from lightning_peft.adapters.gates import RankScale, chain, rank_scale
from lightning_peft.adapters.growth import match_ranks
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.shrink import check_gates, keep_components
from lightning_peft.errors import UserError
from lightning_peft.pruning.allotment import even_ranks
from lightning_peft.pruning.relative_norm import late_budget, relative_norms
from lightning_peft.pruning.sensitivity import above_budget, cubic_budget
from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.hooks import say_if_too_short, steps_of

Curve = Literal["late", "early"]


class DynamicRankDoRA(AdapterStrategy):
    """LoRA as a sum of scaled components, under a falling budget over all layers.

    Args:
        r: Initial rank of every layer, 1.5 times the target in the authors' code.
        target_r: Final rank, on average over the layers.
        start_ratio: Part of the run before the budget begins to fall.
        final_ratio: Part of the run at its end, with the final ranks.
        prune_every: Optimizer steps between two decisions.
        beta: Smoothing of the shares, in [0, 1).
        equilibrium_weight: Weight of the penalty.
        curve: How the budget falls: ``late`` (most at the end, the authors' code) or ``early``
            (most at first, as in AdaLoRA).
        total_step: Optimizer steps of the run; the trainer's when None.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range, or ``curve`` is none of these; at a step, if
            nobody has said how many there are.
    """

    needs = frozenset({"whole weights", "whole steps"})
    changes_ranks = True

    def __init__(
        self,
        r: int = 12,
        target_r: int = 8,
        start_ratio: float = 0.15,
        final_ratio: float = 0.5,
        prune_every: int = 100,
        beta: float = 0.9,
        equilibrium_weight: float = 0.1,
        curve: Curve = "late",
        total_step: int | None = None,
        **lora: Any,
    ) -> None:
        super().__init__(r=r, **lora)
        if not 1 <= target_r <= r:
            raise UserError(f"target_r must lie between 1 and r = {r}, got {target_r}.")
        for key, ratio in (("start_ratio", start_ratio), ("final_ratio", final_ratio)):
            if not 0 <= ratio < 1:
                raise UserError(f"{key} must lie in [0, 1), got {ratio}.")
        if start_ratio + final_ratio >= 1:
            raise UserError(
                "start_ratio + final_ratio must be below 1, so that the budget can fall between "
                f"them, got {start_ratio} + {final_ratio}."
            )
        for name, count in (("prune_every", prune_every), ("total_step", total_step)):
            if count is not None and count < 1:
                raise UserError(f"{name} must be at least 1, got {count}.")
        if not 0 <= beta < 1:
            raise UserError(f"beta must lie in [0, 1), got {beta}.")
        if not 0 <= equilibrium_weight < math.inf:
            raise UserError(
                f"equilibrium_weight must be a finite number of at least 0, got "
                f"{equilibrium_weight}."
            )
        if curve not in get_args(Curve):
            raise UserError(f"curve must be late or early, got {curve!r}.")
        self.target_r, self.start_ratio, self.final_ratio = target_r, start_ratio, final_ratio
        self.prune_every, self.beta, self.curve = prune_every, beta, curve
        self.equilibrium_weight, self.total_step = equilibrium_weight, total_step
        self.shares: dict[str, Tensor] = {}  # smoothed, (rank,) by layer
        self.allocated = False

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach, and refuse a ``rank_gate`` that cannot lose components."""
        report = super().attach(model, initialize)
        check_gates(lora_layers(model).values())
        return report

    def gate(self, r: int) -> nn.Module:
        """The scales c, before what every strategy may have there."""
        return chain(RankScale(r, 0.0), super().gate(r))

    def initialize(self, layer: LoRALinear) -> None:
        """A and B Kaiming-uniform (a = 0), c zero."""
        for matrix, _ in layer.components():
            if not matrix.is_meta:
                nn.init.kaiming_uniform_(matrix)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the number of steps from the trainer, where it has one."""
        super().on_train_start(trainer, pl_module)
        steps = steps_of(trainer)
        if self.total_step is None:
            self.total_step = steps
        else:
            done = f"DynamicRankDoRA's budget is final by total_step = {self.total_step}"
            say_if_too_short(steps, done, self._span()[1] - 1, "leave total_step out")

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Mean variance of the values of an A_i or a B_i, weighted, while the budget falls."""
        layers = lora_layers(model).values()
        if self.allocated or not layers:
            return 0.0
        vectors = [v for layer in layers for v in (layer.active_A, layer.active_B.T)]
        # A vector of a single value has no variance.
        variances = [v.var(1, correction=min(1, v.shape[1] - 1)) for v in vectors]
        return self.equilibrium_weight * torch.cat(variances).mean()

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Update the shares, and allocate the budget if this step is due."""
        super().after_step(model, optimizer, global_step)
        if self.total_step is None:
            raise UserError(
                "total_step: DynamicRankDoRA's budget depends on the number of optimizer steps; "
                "give total_step, since no trainer knows it."
            )
        layers = lora_layers(model)
        if self.allocated or not layers:
            return
        for name, layer in layers.items():
            share = relative_norms(layer.active_B, _values(layer), layer.active_A)
            before = self.shares.get(name, torch.zeros_like(share)).to(share.device)
            self.shares[name] = self.beta * before + (1 - self.beta) * share
        done = global_step + 1
        first, last = self._span()
        if done >= last or (done > first and (done - first) % self.prune_every == 0):
            self._allocate(layers, optimizer, global_step, (first, last))

    def _span(self) -> tuple[int, int]:
        """How many steps are done when the budget begins to fall, and when it is final."""
        assert self.total_step is not None
        first = int(self.start_ratio * self.total_step)
        return first, self.total_step - int(self.final_ratio * self.total_step)

    def _allocate(
        self, layers: dict[str, LoRALinear], optimizer: Optimizer, step: int, span: tuple[int, int]
    ) -> None:
        (first, last), budget_at = span, late_budget if self.curve == "late" else cubic_budget
        start = sum(layer.r for layer in layers.values())
        budget = budget_at(step + 1, start, self.target_r * len(layers), first, 0, last)
        kept = above_budget([self.shares[name] for name in layers], budget)
        decided = dict(zip(layers, (keep.tolist() for keep in kept), strict=True))
        distributed.assert_agreement(step, decided, "the components to keep")
        self.allocated = step + 1 >= last
        for (name, layer), keep in zip(layers.items(), kept, strict=True):
            _values(layer).masked_fill_(~keep, 0.0)
            if self.allocated:
                if not keep.all():
                    keep_components(layer, keep.nonzero()[:, 0], optimizer)
                self.note(step, name, "allocated", layer.rank)
        if self.allocated:
            self.shares.clear()

    def final_parameters(self, model: nn.Module) -> int:
        """The count of ``target_r`` components for each layer; see :func:`even_ranks`."""
        layers = lora_layers(model).values()
        ranks = even_ranks([layer.rank for layer in layers], self.target_r * len(layers))
        match_ranks(zip(layers, ranks, strict=True))
        return super().final_parameters(model)  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """Decisions, the smoothed shares, and whether the ranks are final."""
        own = {"shares": dict(self.shares), "allocated": self.allocated}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self.shares, self.allocated = dict(state_dict["shares"]), state_dict["allocated"]


def _values(layer: LoRALinear) -> Tensor:
    return rank_scale(layer.gate).values
