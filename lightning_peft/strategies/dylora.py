"""DyLoRA (Valipour et al. 2022, https://arxiv.org/abs/2210.07558): one LoRA for a range of ranks.

Each optimizer step draws b from [min_r, r] and computes every layer with its first b components
alone: ``y = W x + lora_alpha / b · B[:, :b] A[:b] x``. So the first learn what matters most, and
the trained model can be cut to any of these ranks (:meth:`DyLoRA.cut`). With ``frozen`` a step
trains component b alone, and uses those before it as they are.

As in the authors' code (huawei-noah/Efficient-NLP, ``DyLoRA/``) one uniform draw holds for the
whole model and optimizer step, the scaling is that of rank b in training and eval, and what has no
gradient in a step is still moved by Adam's moments, under ``frozen`` too.

Deviations: ``frozen`` is off by default, where the authors' script sets it. That script has no
``min_r`` and draws from 1 on, which is the default here. With ``use_rslora`` the scaling is
``lora_alpha / sqrt(b)``; the authors have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.attach import AttachReport, lora_layers
from lightning_peft.adapters.gates import Gate, chain
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.shrink import keep_components
from lightning_peft.errors import UserError
from lightning_peft.strategies.base import AdapterStrategy


class FirstComponents(Gate):
    """The first b components, scaled as a LoRA of rank b; in eval all that there are.

    Args:
        r: Rank that the layer's own scaling is made for.
        use_rslora: Whether that is ``lora_alpha / sqrt(r)``.
    """

    b: Tensor

    def __init__(self, r: int, use_rslora: bool = False) -> None:
        super().__init__()
        self.r, self.power = r, 0.5 if use_rslora else 1.0
        # A buffer, since it outlives a forward: recomputation and resume must find the same draw.
        self.register_buffer("b", torch.tensor(r))
        self._found: tuple[Tensor, int, int] | None = None

    def use(self, b: int) -> None:
        """Compute with the first ``b`` components in training, from now on."""
        if not self.b.is_meta:
            self.b.fill_(b)
            self._found = self.b, self.b._version, b

    def factor(self, b: Any) -> Any:
        """What turns the layer's scaling into that of rank ``b``, a number or a tensor."""
        return (self.r / b) ** self.power

    def forward(self, z: Tensor) -> Tensor:
        """Keep and scale the first components, (..., rank) to (..., rank)."""
        rank = z.shape[-1]
        if not self.training:
            return z * self.factor(rank)
        first = torch.arange(rank, device=self.b.device) < self.b
        return z * (first * self.factor(self.b.clamp(max=rank))).to(z)

    def choose(self, rank: int) -> tuple[Tensor, float] | None:
        """The first b components, and the factor of their scaling."""
        b = rank
        if self.training:  # read once for each draw, since a GPU would be waited for
            found = self._found
            if found is None or found[0] is not self.b or found[1] != self.b._version:
                self._found = found = self.b, self.b._version, int(self.b)
            b = min(found[2], rank)
        return torch.arange(b, device=self.b.device), self.factor(b)

    def last(self, rank: int) -> Tensor:
        """Which component is the last of the first b, (rank,) bool."""
        return torch.arange(1, rank + 1, device=self.b.device) == self.b.clamp(max=rank)


class OneComponentLinear(LoRALinear):
    """LoRA of which a step trains component b alone; the input's gradient passes through all."""

    @property
    def active_A(self) -> Tensor:
        """The living rows of A, (rank, d_in), of which row b trains."""
        return self._last_trains(super().active_A, 0)

    @property
    def active_B(self) -> Tensor:
        """The living columns of B, (d_out, rank), of which column b trains."""
        return self._last_trains(super().active_B, 1)

    def _last_trains(self, factor: Tensor, dim: int) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return factor
        last = _first_components(self.gate).last(self.rank).unsqueeze(1 - dim)
        return torch.where(last, factor, factor.detach())


class DyLoRA(AdapterStrategy):
    """LoRA that is trained at all ranks from ``min_r`` to ``r`` at once.

    Args:
        r: Highest rank, with which eval computes. A layer to which ``rank_pattern`` gives a lower
            one uses all that it has where b is above that.
        min_r: Lowest rank that is drawn.
        frozen: Train component b alone in a step, and not all of the first b.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If ``min_r`` lies outside [1, r].
    """

    def __init__(self, r: int = 8, min_r: int = 1, frozen: bool = False, **lora: Any) -> None:
        super().__init__(r=r, **lora)
        if not 1 <= min_r <= r:
            raise UserError(f"min_r must lie between 1 and r = {r}, got {min_r}.")
        self.min_r, self.frozen = min_r, frozen

    def gate(self, r: int) -> nn.Module:
        """The first b components, before what every strategy may have there."""
        return chain(FirstComponents(r, self.use_rslora), super().gate(r))

    def layer(self, base: nn.Module, name: str) -> nn.Module:
        """LoRA, or with ``frozen`` a form of it that trains one component."""
        kind = OneComponentLinear if self.frozen else LoRALinear
        return kind(base, **self.lora_arguments(name=name))

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach as every strategy does, and draw the first step's rank."""
        report = super().attach(model, initialize)
        self._draw(model)
        return report

    def after_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Draw the next step's rank."""
        super().after_step(model, optimizer, global_step)
        self._draw(model)

    def _draw(self, model: nn.Module) -> None:
        layers = lora_layers(model).values()
        highest = max(layer.rank for layer in layers)
        drawn = torch.randint(min(self.min_r, highest), highest + 1, ())
        b = int(distributed.from_first(drawn))
        for layer in layers:
            _first_components(layer.gate).use(b)

    def cut(self, model: nn.Module, b: int) -> None:
        """Keep the first ``b`` components of every layer, scaled as a LoRA of rank ``b``.

        The model in eval is then what training computed with that b. One run is exported at several
        ranks from the highest to the lowest::

            for b in (8, 4, 2):
                strategy.cut(model, b)
                save_peft(model, f"rank_{b}")

        Args:
            model: The trained model, changed in place. Layers of a rank below ``b`` stay as they
                are.
            b: The rank.

        Raises:
            UserError: If ``b`` was not drawn in training, or the model's adapters are not
                DyLoRA's.
        """
        layers = lora_layers(model).values()
        # They scale what is left. Other adapters are refused, as is a model without any.
        for gate in [layer.gate for layer in layers] or [None]:
            _first_components(gate)
        highest = max(layer.rank for layer in layers)
        lowest = min(self.min_r, highest)  # a rank_pattern may leave all layers below min_r
        if not isinstance(b, int) or isinstance(b, bool) or not lowest <= b <= highest:
            raise UserError(
                f"b must be a whole number from {lowest} to {highest}, the ranks that were trained "
                f"and are still there, got {b!r}."
            )
        for layer in layers:
            if layer.rank > b:
                keep_components(layer, torch.arange(b))


def _first_components(gate: nn.Module | None) -> FirstComponents:
    """The part of a gate that chooses the first components."""
    parts = gate.modules() if gate is not None else ()
    found = next((part for part in parts if isinstance(part, FirstComponents)), None)
    if found is None:
        raise UserError(
            "the model's adapters were not made by DyLoRA; cut the model that it trained, before "
            "it is exported."
        )
    return found
