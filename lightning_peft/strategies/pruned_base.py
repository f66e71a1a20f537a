"""Methods that prune the base under the adapters: heads and MLP channels leave it for real.

What can leave a model, and how its configuration follows, stands in :mod:`..adapters.groups`. A
checkpoint says which groups of the original base are left, so that a resumed, tested or exported
run takes the others out before tensors are loaded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.attach import AttachReport, lora_layers
from lightning_peft.adapters.groups import (
    Groups,
    Kind,
    changes,
    groups_of,
    refusal,
    refuse_fixed,
    shrink,
)
from lightning_peft.errors import UserError
from lightning_peft.pruning import linalg, schedule
from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.hooks import say_if_too_short, steps_of


class PrunedBase(AdapterStrategy):
    """LoRA over a base of LLaMA's layout that loses heads and MLP channels while it trains.

    A method says in ``before_step`` what groups are worth, and calls :meth:`remove` where a step is
    due. The share that has gone rises as a cubic over the removals.

    Args:
        r: Rank.
        ratio: Share of each layer's MLP channels that has gone at the end, in [0, 1).
        head_ratio: The same of its heads; ``ratio`` when None. 0 keeps all.
        start_step: Optimizer step (0-based) of the first removal.
        prune_every: Optimizer steps between removals.
        removals: How many removals there are.
        lora: The arguments that all strategies share.

    Attributes:
        groups: The original base's, by the full name of their attention or MLP.
        kept: Which of them are left, indices by the same name, on the CPU.

    Raises:
        UserError: If a number lies outside its range.
    """

    needs = frozenset({"changing sizes"})

    def __init__(
        self,
        r: int = 8,
        ratio: float = 0.5,
        head_ratio: float | None = None,
        start_step: int = 100,
        prune_every: int = 10,
        removals: int = 10,
        **lora: Any,
    ) -> None:
        super().__init__(r=r, **lora)
        for key, share in (("ratio", ratio), ("head_ratio", head_ratio or 0)):
            if not 0 <= share < 1:
                raise UserError(f"{key} must lie in [0, 1), got {share}.")
        for key, value, least in (
            ("start_step", start_step, 0),
            ("prune_every", prune_every, 1),
            ("removals", removals, 1),
        ):
            if value < least:
                raise UserError(f"{key} must be at least {least}, got {value}.")
        self.ratio, self.head_ratio = ratio, head_ratio
        self.start_step, self.prune_every, self.removals = start_step, prune_every, removals
        self.groups: dict[str, Groups] = {}
        self.kept: dict[str, Tensor] = {}
        self._left: dict[Kind, list[int]] = {}  # groups of a layer after 0, 1, … removals

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach; refuse a base that cannot lose as much, or that could not be saved afterwards."""
        if distributed.is_distributed():
            raise UserError(
                f"{type(self).__name__} changes the sizes of weights, which several processes hold "
                "in buckets or shares; run it on one device."
            )
        groups = groups_of(model)
        refuse_fixed(model, groups)
        counts = {each.kind: each.count for each in groups.values()}
        left = {kind: self._plan(model, kind, count) for kind, count in counts.items()}
        if all(left[kind][-1] == count for kind, count in counts.items()):
            raise UserError(
                f"ratio = {self.ratio} takes none of a layer's {counts['channels']} channels, and "
                f"head_ratio = {self.head_ratio} none of its {counts['heads']} key/value heads; "
                "give a larger one."
            )
        report = super().attach(model, initialize)
        self.groups, self._left = groups, left
        self.kept = {name: torch.arange(each.count) for name, each in groups.items()}
        return report

    def _plan(self, model: nn.Module, kind: Kind, total: int) -> list[int]:
        """How many groups of a kind are left in a layer after each removal, and before the first.

        A configuration has to hold the last number only: until then nothing is exported.
        """
        key = "ratio" if kind == "channels" or self.head_ratio is None else "head_ratio"
        ratio, n = getattr(self, key), self.removals
        counts = [schedule.left_after(total, ratio, i, n) for i in range(n + 1)]

        def reason(left: int) -> str | None:
            return refusal(model.config, changes(model, {kind: left}))

        if kind == "heads" and reason(counts[-1]) is not None:  # of channels any number will do
            fitting = [left for left in range(total, 0, -1) if reason(left) is None]
            # In four digits and rounded up, since what leaves is rounded down.
            ratios = [math.ceil(1e4 * (1 - left / total) - 1e-6) / 1e4 for left in fitting]
            raise UserError(
                f"{key} = {ratio} leaves {counts[-1]} of {total} key/value heads, which "
                f"{type(model.config).__name__} refuses ({reason(counts[-1])}); give head_ratio "
                f"one of {', '.join(f'{r:g}' for r in ratios)}."
            )
        return counts

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell a run that is too short."""
        super().on_train_start(trainer, pl_module)
        last = self.start_step + (self.removals - 1) * self.prune_every
        done = f"{type(self).__name__} makes its last removal"
        instead = "lower start_step, prune_every or removals"
        say_if_too_short(steps_of(trainer), done, last, instead, "with a larger base")

    def excess(self, removals: int | None = None) -> dict[str, int]:
        """Where more groups are left than after so many removals (all when None): how many then."""
        index = self.removals if removals is None else min(removals, self.removals)
        left = {name: self._left[each.kind][index] for name, each in self.groups.items()}
        return {name: count for name, count in left.items() if len(self.kept[name]) > count}

    def due(self, step: int) -> dict[str, int]:
        """Which attentions and MLPs lose groups at a step, with the number that stays."""
        if not schedule.prune_due(step, self.start_step, self.prune_every):
            return {}
        return self.excess((step - self.start_step) // self.prune_every + 1)

    def remove(
        self, model: nn.Module, optimizer: Optimizer, step: int, importance: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Remove the least important groups that are due; of equal ones the first.

        Args:
            model: The adapted model.
            optimizer: Whose moments follow.
            step: Optimizer step, 0-based.
            importance: Of the groups that are left now, (groups,) by name.

        Returns:
            Positions of those that stay, among those before, by name; increasing.
        """
        stay = {}
        for name, count in self.due(step).items():
            scores = importance[name]
            gone = schedule.select_per_matrix(scores, len(scores) - count)
            stay[name] = linalg.survivors(gone, len(scores))
        if stay:
            shrink(model, stay, optimizer)
        layers = lora_layers(model)
        for name, indices in stay.items():
            self.kept[name] = self.kept[name][indices.cpu()]
            for member in self.groups[name].members:
                if member.name in layers:
                    self.note(step, member.name, "narrowed", layers[member.name].rank)
        return stay

    def restructure(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Take out of the base what the checkpoint's has lost."""
        stay = {}
        for name, saved in state["kept"].items():
            present = torch.isin(self.kept[name], saved)
            if int(present.sum()) < len(saved):
                raise UserError(
                    f"the checkpoint holds groups of {name} that this model has lost; load the "
                    "base anew."
                )
            if len(saved) < len(present):
                stay[name] = present.nonzero().flatten()
        shrink(model, stay)
        self.kept = dict(state["kept"])

    def final_parameters(self, model: nn.Module) -> int | None:
        """The count of the adapters at the end, which get smaller with their base."""
        shrink(model, {name: torch.arange(count) for name, count in self.excess().items()})
        return super().final_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """Decisions, and what is left of the base."""
        return {**super().state_dict(), "kept": dict(self.kept)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self.kept = dict(state_dict["kept"])
