"""ElaLoRA (Chang et al. 2025, https://arxiv.org/abs/2504.00254): components move between layers.

``ΔW = s P Λ Q`` with AdaLoRA's penalty and importance (smoothed sensitivity × uncertainty of its
values). After a warm-up, every ``mask_interval`` steps each layer offers its ``k`` least important
components; the ``b`` least important of all that are offered leave, and the layers of the ``b``
most important ones get as many, so that the total stays. ``b`` falls with the cube of the time, and
the last ``final_warmup`` steps leave ranks alone. A new vector of P and Q is a random one, made
orthogonal to those that are there, of length one; its Λ begins next to zero. Written by the
authors' code (HuandongChang/ElaLoRA, ``elalora.py``), whose arguments keep their names here.

Deviations: the scaling is lora_alpha / r, where the code divides by r + 1e-5. Moments of what stays
are kept, where the code makes a new optimizer at each event (which no schedule of the learning rate
reaches any more). ``max_r`` bounds a layer. Of equal components the first in the model's order
leaves, the code's ``topk`` says none.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.attach import AttachReport, lora_layers
from lightning_peft.adapters.gates import RankScale, chain, rank_scale
from lightning_peft.adapters.growth import add_components
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.shrink import check_gates, keep_components
from lightning_peft.errors import UserError
from lightning_peft.pruning import exchange, linalg
from lightning_peft.pruning.orthogonality import unit_beside
from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.hooks import say_if_too_short, steps_of
from lightning_peft.strategies.triplets import TripletImportance, orthogonality_penalty

SMALLEST = 1e-13  # Λ of a new component, or the layer's own smallest
LEAST = {"b": 1, "k": 1, "init_warmup": 0, "final_warmup": 0, "mask_interval": 1}


class ElaLoRA(AdapterStrategy):
    """LoRA in the form of a singular value decomposition, whose ranks move between layers.

    The total of ranks stays; that of parameters changes a little where layers differ in size.

    Args:
        r: Rank of every layer at the start, and on average over the layers throughout.
        b: Components that are exchanged at the first event.
        k: How many of a layer may leave or be added at one event.
        init_warmup: Optimizer steps before the first interval begins.
        final_warmup: Optimizer steps at the end, with the final ranks.
        mask_interval: Optimizer steps between two events.
        max_r: The most components of a layer; 4 times ``r`` when None. With several processes every
            layer is made with room for as many.
        beta1: Smoothing of the sensitivity, in (0, 1).
        beta2: Smoothing of its uncertainty, in (0, 1).
        orth_reg_weight: Weight of the penalty ``‖PᵀP - I‖_F``, ``‖QQᵀ - I‖_F``, averaged over the
            matrices.
        total_step: Optimizer steps of the run; the trainer's when None.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range.
    """

    needs = frozenset({"whole weights", "whole steps"})
    changes_ranks = True

    def __init__(
        self,
        r: int = 10,
        b: int = 4,
        k: int = 2,
        init_warmup: int = 300,
        final_warmup: int = 500,
        mask_interval: int = 50,
        max_r: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.1,
        total_step: int | None = None,
        **lora: Any,
    ) -> None:
        super().__init__(r=r, **lora)
        self.b, self.k, self.max_r = b, k, 4 * r if max_r is None else max_r
        self.init_warmup, self.final_warmup = init_warmup, final_warmup
        self.mask_interval, self.total_step = mask_interval, total_step
        self.beta1, self.beta2, self.orth_reg_weight = beta1, beta2, orth_reg_weight
        if self.max_r < r:
            raise UserError(f"max_r must be at least r = {r}, got {max_r}.")
        for key, bound in LEAST.items():
            if getattr(self, key) < bound:
                raise UserError(f"{key} must be at least {bound}, got {getattr(self, key)}.")
        for key, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise UserError(f"{key} must lie in (0, 1), got {beta}.")
        self._check_schedule()
        self.averages = TripletImportance(beta1, beta2)

    def _check_schedule(self) -> None:
        if self.total_step is None:
            return
        if self.init_warmup + self.final_warmup >= self.total_step:
            raise UserError(
                f"init_warmup + final_warmup must be below total_step = {self.total_step}, so that "
                f"ranks can move between them, got {self.init_warmup} + {self.final_warmup}."
            )
        first = self.init_warmup + self.mask_interval
        schedule = self.init_warmup, self.final_warmup, self.total_step
        if not exchange.falling_count(first, self.b, *schedule):
            raise UserError(
                f"mask_interval = {self.mask_interval} and b = {self.b} let no rank move between "
                f"init_warmup = {self.init_warmup} and the last final_warmup = {self.final_warmup} "
                f"of total_step = {self.total_step} steps; lower mask_interval, or raise b."
            )

    def gate(self, r: int) -> nn.Module:
        """The singular values Λ, before what every strategy may have there."""
        return chain(RankScale(r, 0.0), super().gate(r))

    def layer(self, base: nn.Module, name: str) -> nn.Module:
        """A layer that may grow."""
        return LoRALinear(base, **self.lora_arguments(name=name), max_r=self.max_r)

    def initialize(self, layer: LoRALinear) -> None:
        """P and Q normal with standard deviation 0.02, Λ zero."""
        with torch.no_grad():
            for matrix in (layer.active_A, layer.active_B):
                # A draw of its own, which does not depend on the room that an engine leaves.
                matrix.copy_(0.02 * torch.randn(matrix.shape, device=matrix.device))

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
            done = f"ElaLoRA's ranks are final by total_step = {self.total_step}"
            last = self.total_step - self.final_warmup - 1
            say_if_too_short(steps, done, last, "leave total_step out")

    def penalty(self, model: nn.Module) -> Tensor | float:
        """How far P and Q are from orthonormal ones."""
        return self.orth_reg_weight * orthogonality_penalty(model)

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Update the importance, and exchange components if this step is due."""
        super().after_step(model, optimizer, global_step)
        if self.total_step is None:
            raise UserError(
                "total_step: ElaLoRA's schedule depends on the number of optimizer steps; give "
                "total_step where there is no trainer to ask."
            )
        layers = lora_layers(model)
        if global_step >= self.total_step - self.final_warmup or not layers:
            self.averages.clear()
            return
        finite = self.averages.update(layers)
        since = global_step - self.init_warmup
        if since > 0 and since % self.mask_interval == 0 and finite:
            self._exchange(layers, optimizer, global_step)

    def _exchange(self, layers: dict[str, LoRALinear], optimizer: Optimizer, step: int) -> None:
        assert self.total_step is not None
        schedule = self.init_warmup, self.final_warmup, self.total_step
        count = exchange.falling_count(step, self.b, *schedule)
        scores = [self.averages.score(name) for name in layers]
        removed, added = exchange.exchanged(scores, count, self.k, self.max_r)
        decided = dict(zip(layers, zip(removed, added, strict=True), strict=True))
        distributed.assert_agreement(step, decided, "the components to exchange")
        for name, (gone, _) in decided.items():
            if gone:
                self._remove(name, layers[name], gone, optimizer)
                self.note(step, name, "removed", layers[name].rank)
        for name, (_, new) in decided.items():
            for _ in range(new):
                self._add(name, layers[name], optimizer)
            if new:
                self.note(step, name, "added", layers[name].rank)

    def _remove(self, name: str, layer: LoRALinear, gone: list[int], optimizer: Optimizer) -> None:
        kept = linalg.survivors(torch.tensor(gone), layer.rank)
        keep_components(layer, kept, optimizer)
        self.averages.keep(name, kept)

    def _add(self, name: str, layer: LoRALinear, optimizer: Optimizer) -> None:
        Q, P = layer.active_A.detach(), layer.active_B.detach()
        row, column = (  # one draw for all processes
            unit_beside(rows, distributed.from_first(torch.randn(rows.shape[1])).to(rows))
            for rows in (Q, P.T)
        )
        values = rank_scale(layer.gate).values.detach()[: layer.rank]
        smallest = min(float(values.abs().min()), SMALLEST)
        add_components(layer, row[None], column[:, None], optimizer, gate=smallest)
        self.averages.add(name)

    def state_dict(self) -> dict[str, Any]:
        """Decisions and the smoothed importance."""
        return {**super().state_dict(), "averages": self.averages.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self.averages.restore(state_dict["averages"])
