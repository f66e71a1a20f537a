"""Methods that look at a sample of the data first, and then give each layer its rank.

A layer is made at rank ``r`` and is given the allotted one in :meth:`Allotted.prepare`, or by
:meth:`Allotted.restructure` on resume. Both come before an engine has buckets or shares of the
parameters and before there is an optimizer's state, so tensors get their new size for good, under
DDP and ZeRO too, and no process keeps room for a rank that it does not use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_peft import distributed
from lightning_peft.adapters.attach import AttachReport, lora_layers
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.shrink import replace_tensor
from lightning_peft.errors import UserError
from lightning_peft.pruning.allotment import check_budget
from lightning_peft.strategies.base import AdapterStrategy, Loss, Sample
from lightning_peft.strategies.signatures import MakeOptimizer

Layers = dict[str, LoRALinear]


class Allotted(AdapterStrategy):
    """LoRA whose ranks differ by layer, by what a sample shows before training.

    A method says what to look at (:meth:`look`), the ranks that follow (:meth:`ranks`), and where a
    layer starts if not as LoRA does (:meth:`start`). A layer of rank 0 is left out. In a plain loop
    call :meth:`prepare` after ``attach``.

    Args:
        r: Rank of every layer if they were alike.
        min_r: Lowest rank.
        max_r: Highest rank; 2 r when None.
        budget: Components in all layers together; when None as many as at rank ``r``, or at that of
            ``rank_pattern``.
        sample_ratio: Share of the training set that is looked at, in (0, 1].
        max_batches: The most batches to look at, all processes together (each takes as many, so it
            is rounded up); None for the whole sample.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range; at attach, if the bounds do not allow the
            budget.
    """

    # The arguments that bound a layer's rank.
    bounds: ClassVar[str] = "min_r or max_r"

    def __init__(
        self,
        r: int = 8,
        min_r: int = 1,
        max_r: int | None = None,
        budget: int | None = None,
        sample_ratio: float = 0.1,
        max_batches: int | None = None,
        **lora: Any,
    ) -> None:
        super().__init__(r=r, **lora)
        self.max_r = 2 * r if max_r is None else max_r
        if not 0 <= min_r <= r:
            raise UserError(f"min_r must lie between 0 and r = {r}, got {min_r}.")
        if self.max_r < r:
            raise UserError(f"max_r must be at least r = {r}, got {max_r}.")
        if not 0 < sample_ratio <= 1:
            raise UserError(f"sample_ratio must lie in (0, 1], got {sample_ratio}.")
        if max_batches is not None and max_batches < 1:
            raise UserError(f"max_batches must be at least 1, got {max_batches}.")
        self.min_r, self.budget = min_r, budget
        self.sample_ratio, self.max_batches = sample_ratio, max_batches
        self.seen = 0  # batches, on all processes together
        # By layer its "rank" and "scaling"; empty until they are known.
        self.allotted: dict[str, dict[str, Any]] = {}

    # What a method says.

    def look(self, model: nn.Module, batches: Iterator[Any], loss: Loss) -> dict[str, Any]:
        """Look at the sample once, and reduce what was seen over all processes.

        Args:
            model: The adapted model, which adds nothing to its base yet.
            batches: This process' batches, to the end; None where it has none left. Afterwards
                ``seen`` says how many all processes had.
            loss: Of one batch; on every process of every batch.

        Returns:
            What was found, by layer.
        """
        raise NotImplementedError

    def ranks(self, layers: Layers, found: dict[str, Any]) -> list[int]:
        """The rank of each layer, in order, from what :meth:`look` found."""
        raise NotImplementedError

    def scaling(self, name: str, layer: LoRALinear, rank: int) -> float:
        """The scaling of a layer at its rank; by default that of a layer made at this rank."""
        alpha = self._alphas.of(name, self.lora_alpha)
        return float(alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def start(self, layer: LoRALinear, found: Any) -> None:
        """Set a layer's parameters, which :meth:`initialize` has just set as LoRA does."""

    def most(self, layer: LoRALinear) -> int:
        """The highest rank that a layer may be given."""
        return self.max_r

    # What follows from it.

    def components(self, layers: Layers) -> int:
        """The budget, in components."""
        return (
            sum(layer.r or 0 for layer in layers.values()) if self.budget is None else self.budget
        )

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach as every strategy does, and refuse a budget that the bounds do not allow."""
        report = super().attach(model, initialize)
        layers = lora_layers(model)
        most = sum(self.most(layer) for layer in layers.values())
        hint = ", the sum of all r" if self.budget is None else ""
        hint += f"; give another budget, or change r, {self.bounds}"
        check_budget(self.components(layers), len(layers), self.min_r, most, hint)
        return report

    @property
    def looks_at_data(self) -> bool:
        """Unless the ranks are known."""
        return not self.allotted

    def prepare(
        self,
        model: nn.Module,
        sample: Sample,
        loss: Loss,
        optimizer: MakeOptimizer = torch.optim.AdamW,
        accumulate: int = 1,
    ) -> None:
        """Look at the sample, and give each layer its rank, the same on all processes."""
        if self.allotted:
            return
        layers = lora_layers(model)
        devices = {p.device.index for p in model.parameters() if p.is_cuda}
        was_training = model.training
        # What a look draws (dropout) is not missing in the run's own random stream.
        with torch.random.fork_rng(devices=sorted(devices)):
            found = self.look(model, self._batches(sample), loss)
        model.train(was_training)
        # Sums over processes may differ in a last bit, by which a remainder may be decided.
        ranks = distributed.from_first(torch.tensor(self.ranks(layers, found))).tolist()
        allotted = {
            name: {"rank": rank, "scaling": self.scaling(name, layer, rank) if rank else 0.0}
            for (name, layer), rank in zip(layers.items(), ranks, strict=True)
        }
        self._apply(model, allotted)
        for name, layer in lora_layers(model).items():
            self.initialize(layer)
            self.start(layer, found[name])
            for parameter, _ in layer.components():
                distributed.write(parameter, distributed.from_first(parameter.detach()))
        for name, entry in allotted.items():
            self.note(0, name, "allotted", entry["rank"])

    def _batches(self, sample: Sample) -> Iterator[Any]:
        """This process' batches, counted; the last thing that it does is to compare the count."""
        limit = self.max_batches and -(-self.max_batches // distributed.world_size())
        seen = 0
        for batch in itertools.islice(sample(self.sample_ratio), limit):
            seen += batch is not None
            yield batch
        self.seen = int(distributed.total([torch.tensor(seen)])[0])
        if not self.seen:
            raise UserError(
                f"{type(self).__name__}'s sample is empty at sample_ratio {self.sample_ratio}."
            )

    def _apply(self, model: nn.Module, allotted: dict[str, dict[str, Any]]) -> None:
        """Give layers their ranks, with zeros in A and B."""
        for name, layer in lora_layers(model).items():
            if name not in allotted:  # a checkpoint of other layers, which is refused later
                continue
            rank = allotted[name]["rank"]
            if not rank:
                model.set_submodule(name, layer.base)
                continue
            for parameter, dim in layer.components():
                size = [rank if i == dim else n for i, n in enumerate(parameter.shape)]
                replace_tensor(parameter, parameter.detach().new_zeros(size))
            gate = self.gate(rank)
            layer.gate = None if gate is None else gate.to(next(layer.own_parameters()).device)
            layer.r = layer.rank = layer.max_r = rank
            layer.scaling = allotted[name]["scaling"]
        self.allotted = allotted

    def restructure(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Give layers the ranks and scalings of a checkpoint instead of looking again."""
        if not self.allotted:
            self._apply(model, state["allotted"])
        elif self.allotted != state["allotted"]:
            raise UserError(
                f"the checkpoint was trained with other ranks than those that this "
                f"{type(self).__name__} has allotted; set trainer.ckpt_path before trainer.fit(), "
                "so that no sample is looked at."
            )

    def final_parameters(self, model: nn.Module) -> int | None:
        """None before the look at the sample, which decides on the ranks."""
        return super().final_parameters(model) if self.allotted else None

    def state_dict(self) -> dict[str, Any]:
        """Decisions, and the allotted ranks with their scalings."""
        return {**super().state_dict(), "allotted": self.allotted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self.allotted = state_dict["allotted"]
