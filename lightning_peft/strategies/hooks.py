"""Lightning's hooks call a strategy's methods, so that nobody has to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.errors import UserError
from lightning_peft.strategies.calls import CallWatch


class StepHooks(Callback):
    """Calls ``before_step`` and ``after_step`` around each optimizer step of a Lightning run.

    Attributes:
        model: The adapted model; None before it is attached.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module | None = None
        self._calls: CallWatch | None = None
        self._last_step = -1

    def before_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Act before the optimizer's step."""

    def after_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Act after the optimizer's step."""

    def watch_calls(
        self,
        model: nn.Module,
        needed: set[str],
        first: Callable[[Optimizer], None] | None = None,
    ) -> None:
        """From now on raise at an optimizer's step around which a needed method was not called.

        Args:
            model: Whose adapters make an optimizer one to watch.
            needed: ``before_step``, ``after_step``, both or none.
            first: Called with such an optimizer after its first step; it may raise.
        """
        layers = list(adapter_layers(model).values())
        own = functools.partial(_parameters, layers)
        self._calls = CallWatch(type(self).__name__, needed, own, first=first)
        # Only these: a noted method refers to its strategy, so that strategy and model go when the
        # garbage collector comes, and not at once.
        for name in needed:
            self.note_calls(name, name)

    def note_calls(self, name: str, method: str) -> None:
        """From now on note calls of a method under a name."""
        assert self._calls is not None
        setattr(self, method, self._calls.noting(name, getattr(self, method)))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Call :meth:`before_step`, at a window's last micro-batch only."""
        if self.model is not None and not trainer.fit_loop._should_accumulate():
            self.before_step(self.model, optimizer, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call :meth:`after_step` once for each optimizer step, not for each micro-batch."""
        step = trainer.global_step - 1
        if self.model is not None and step > self._last_step and step >= 0:
            self.after_step(self.model, trainer.optimizers[0], step)
            every = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if every and (step + 1) % every == 0:
                self.assert_optimized(trainer.optimizers, step)
                self.assert_agreement(step)
        self._last_step = max(step, self._last_step)

    def assert_agreement(self, step: int) -> None:
        """Raise if processes have come to other ranks or shared layers; cheap where they agree."""
        assert self.model is not None
        first: dict[int, str] = {}
        structure = {
            name: [layer.rank, first.setdefault(layer.sharing_key, name)]
            for name, layer in adapter_layers(self.model).items()
        }
        distributed.assert_agreement(step, structure, "ranks and sharing")

    def assert_optimized(self, optimizers: Iterable[Optimizer], step: int) -> None:
        """Raise if an adapter trains a parameter that no optimizer has."""
        assert self.model is not None
        held = {id(p) for optimizer in optimizers for p in distributed.parameters_of(optimizer)}
        for name, layer in adapter_layers(self.model).items():
            for parameter in layer.own_parameters():
                if parameter.requires_grad and id(parameter) not in held:
                    raise UserError(
                        f"after step {step} {name} has a parameter of shape "
                        f"{tuple(distributed.shape(parameter))} that the optimizer does not have, "
                        "so that it never trains; change ranks by keep_components and "
                        "add_components, which keep the parameter and change what it holds."
                    )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin after the steps that a resumed run has made already."""
        self._last_step = trainer.global_step - 1
        if self._calls is not None:
            self._calls.begin()
        if self.model is not None:
            self.assert_agreement(trainer.global_step)


def steps_of(trainer: Trainer) -> int | None:
    """How many optimizer steps a run will have; None where its trainer cannot know."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 <= steps < math.inf else None


def say_if_too_short(
    steps: int | None, done: str, last: int, instead: str, end: str = "before"
) -> None:
    """Warn where a run ends before a method is done.

    Args:
        steps: Of the run; None where nobody knows.
        done: What the method has then: ``PrunedLoRA reaches target_r = 8``.
        last: Optimizer step (0-based) at which it has.
        instead: What to change.
        end: How the run ends: ``before``, ``with more``.
    """
    if steps is not None and last >= steps:
        rank_zero_warn(
            f"{done} at step {last}, but this run has {steps} steps and ends {end}: {instead}."
        )


def _parameters(layers: list[AdaptedLayer]) -> list[nn.Parameter]:
    return [parameter for layer in layers for parameter in layer.own_parameters()]
