"""Tied-LoRA (Renduchintala et al. 2023, https://arxiv.org/abs/2311.09578): one LoRA for all layers.

``y = W x + s · v ⊙ B (u ⊙ A x)``: A and B are trained and tied over the model's blocks, u (r,) and
v are trained for each block. The paper stacks the targets of a block into one product, so that A
and u are common to a block's targets and B and v are their rows of the stack; this reading meets
the count that the LoRA-drop paper prints. Targets of another input width have an A of their own.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lightning_peft.adapters.attach import AttachReport, kind_of, lora_layers, make_report
from lightning_peft.adapters.gates import RankScale, chain, rank_scale
from lightning_peft.adapters.scaled import ScaledLinear
from lightning_peft.strategies.base import AdapterStrategy


def block_of(name: str) -> str:
    """The block of a layer's full name: up to its last number, else all but its last part."""
    numbered = re.match(r"(.*\.\d+)\.", f".{name}")
    return numbered[1] if numbered else name.rpartition(".")[0]


class TiedLinear(ScaledLinear):
    """A layer whose components are every layer's, so that none can be removed here alone."""

    def components(self) -> list[tuple[nn.Parameter, int]]:
        """None."""
        return []


class TiedLoRA(AdapterStrategy):
    """One A, one B for each target kind, and vectors of each block's own.

    Args:
        r: Rank.
        lora: The arguments that all strategies share.
    """

    def gate(self, r: int) -> nn.Module:
        """The vector u, before what every strategy may have there."""
        return chain(RankScale(r, 1.0), super().gate(r))

    def layer(self, base: nn.Module, name: str) -> TiedLinear:
        """Of one rank, since all share their components."""
        return TiedLinear(base, **self.lora_arguments(name=name, r=self.r))

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach as every strategy does, and tie what layers share."""
        report = super().attach(model, initialize)
        tied: dict[Any, nn.Parameter] = {}
        for name, layer in lora_layers(model).items():
            width, height = layer.in_features, layer.out_features
            layer.lora_A = tied.setdefault(("A", width), layer.lora_A)
            layer.lora_B = tied.setdefault(("B", kind_of(name), height, width), layer.lora_B)
            scale = rank_scale(layer.gate)
            scale.values = tied.setdefault(("u", block_of(name)), scale.values)
        return make_report(model, report.strategy, report.matched)
