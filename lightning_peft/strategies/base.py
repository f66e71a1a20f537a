"""The interface of every method: what stands beside a linear, and what happens at each step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lightning_peft import distributed
from lightning_peft.adapters.attach import (
    AttachReport,
    adapter_layers,
    make_report,
    match_targets,
    own_parameters,
    replace_linears,
)
from lightning_peft.adapters.dropout import share_draws
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.state import fingerprint, trainable_parameters
from lightning_peft.errors import UserError

Gate = Callable[[int], nn.Module]
Sample = Callable[[float], Iterable[Any]]
Loss = Callable[[Any], Tensor]


def _noted(method: Callable[..., None]) -> Callable[..., None]:
    """Remember that a method was called since the optimizer's last step."""

    @functools.wraps(method)
    def wrapper(self: AdapterStrategy, *args: Any, **kwargs: Any) -> None:
        self._noted.add(method.__name__)
        method(self, *args, **kwargs)

    return wrapper


# Those whose calls are watched. One hook serves all: a hook that removes itself, or is removed by
# the garbage collector, would change torch's collection of hooks while torch iterates over it.
_watched: weakref.WeakSet[AdapterStrategy] = weakref.WeakSet()


def _watch(strategy: AdapterStrategy) -> None:
    if not _watched_hook:
        _watched_hook.append(register_optimizer_step_post_hook(_optimizer_stepped))
    _watched.add(strategy)


def _optimizer_stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for strategy in list(_watched):
        strategy._stepped(optimizer)


_watched_hook: list[RemovableHandle] = []


def _step_masks(model: nn.Module) -> list[Any]:
    """The parts of gates that hold one draw over a whole optimizer step."""
    gates = [layer.gate for layer in adapter_layers(model).values() if layer.gate is not None]
    return [part for gate in gates for part in gate.modules() if hasattr(part, "new_step")]


class AdapterStrategy(Callback):
    """How a frozen model is adapted, and how its adapters are pruned or shared while it trains.

    Every method has a default, and the defaults are LoRA. Before :meth:`attach` an instance holds
    arguments only. In a Lightning run the hooks below call its methods; in any other loop call them
    by hand::

        strategy = PrunedLoRA(r=32, target_r=8)
        print(strategy.attach(model))
        for step, batch in enumerate(loader):
            (loss(model, batch) + strategy.penalty(model)).backward()
            strategy.before_step(model, optimizer, step)
            optimizer.step()
            strategy.after_step(model, optimizer, step)
            optimizer.zero_grad()

    A new method overrides what differs; :meth:`gate` is the smallest thing::

        class HalfDrop(AdapterStrategy):
            def gate(self, r):
                return nn.Dropout(0.5)

    Args:
        r: Rank, at least 1.
        lora_alpha: Numerator of the scaling ``lora_alpha / r``; 2 r when None.
        lora_dropout: Probability of dropping an element of a layer's input, in training.
        target_modules: The linears to adapt: a list of names or ends of names, a regex of full
            names, or ``all-linear`` (every linear but the output layer).
        exclude_modules: The same forms, taken away from the targets.
        modules_to_save: Modules that train in full beside the adapters (a classification head), and
            are saved with them; names or ends of names.
        use_rslora: Scale by ``lora_alpha / sqrt(r)``.
        init_lora_weights: True (A Kaiming-uniform, B zero), ``gaussian``, or False, as in PEFT.
        rank_gate: Makes the module between A and B from the rank, for every method that does not
            bring its own: DropLoRA's masks on any other method.
        share_dropout: Draw the dropout of an input once for all layers that read it (query, key and
            value), instead of once for each: faster, and another method than PEFT's.

    Raises:
        UserError: If ``r`` is below 1 or ``lora_dropout`` lies outside [0, 1).
    """

    # What a method must have of its engine, whatever it is: "whole weights" (outside of a layer's
    # forward pass too), "whole steps" (the optimizer and after_step see parameters, gradients and
    # state as they are on one device), "weights at attach" (the base's values when adapters are put
    # beside it, which is therefore loaded whole before it is cut). Checked when a run starts.
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        r: int = 8,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        modules_to_save: list[str] | None = None,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        rank_gate: Gate | None = None,
        share_dropout: bool = False,
    ) -> None:
        super().__init__()
        if r < 1:
            raise UserError(f"r must be at least 1, got {r}.")
        if not 0 <= lora_dropout < 1:
            raise UserError(f"lora_dropout must lie in [0, 1), got {lora_dropout}.")
        self.r = r
        self.lora_alpha = 2 * r if lora_alpha is None else lora_alpha
        self.lora_dropout = lora_dropout
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        self.modules_to_save = modules_to_save
        self.use_rslora = use_rslora
        self.init_lora_weights = init_lora_weights
        self.rank_gate = rank_gate
        self.share_dropout = share_dropout
        self.model: nn.Module | None = None
        self.base_fingerprint = ""
        self.decisions: list[dict[str, Any]] = []
        self._noted: set[str] = set()
        self._layers: list[LoRALinear] = []
        self._needed: set[str] = set()
        self._steps = 0
        self._last_step = -1

    # What a method may override.

    def gate(self, r: int) -> nn.Module | None:
        """What stands between A and B: a module on rank activations (..., r), or nothing.

        In eval it must be a fixed diagonal. See :mod:`lightning_peft.adapters.gates`.
        """
        return self.rank_gate(r) if self.rank_gate is not None else None

    def layer(self, base: nn.Module) -> nn.Module:
        """What stands in the place of a linear: an adapted layer over it, or the linear itself."""
        return LoRALinear(
            base, self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.gate(self.r)
        )

    def initialize(self, layer: LoRALinear) -> None:
        """Set a layer's parameters before training; the layer should equal its base."""
        layer.reset_parameters(self.init_lora_weights)

    @property
    def looks_at_data(self) -> bool:
        """Whether :meth:`prepare` will ask for data, so that the base has to be whole by then."""
        return type(self).prepare is not AdapterStrategy.prepare

    def prepare(
        self,
        model: nn.Module,
        sample: Sample,
        loss: Loss,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.AdamW,
        accumulate: int = 1,
    ) -> None:
        """Look at data before the first step, and change the layers if need be.

        Not called on resume. With several processes each is given its share of the sample, the same
        number of batches; what is learned from them is to be reduced
        (:mod:`lightning_peft.distributed`).

        Args:
            model: The adapted model.
            sample: Gives batches of a stratified share (0 to 1) of the training set, to iterate
                again and again.
            loss: Of one batch, a scalar with gradients.
            optimizer: Makes the optimizer of updates that are thrown away.
            accumulate: Batches to an optimizer step.
        """

    @_noted
    def before_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Act after the backward pass and before the optimizer's step ``global_step`` (0-based).

        Gradients are those of the whole accumulation window, unscaled and not yet clipped. Where an
        engine keeps them elsewhere ``parameter.grad`` is None or a share:
        :func:`lightning_peft.distributed.gradient` gives the full one everywhere.
        """

    @_noted
    def after_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Act after the optimizer's step ``global_step`` (0-based); overriders call ``super()``."""
        for mask in _step_masks(model):
            mask.new_step()

    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """‖ΔW‖_F by full name, scalars, of weights that train themselves; adapters say their own.

        A method without adapters has no other importance to watch.
        """
        return {}

    def penalty(self, model: nn.Module) -> Tensor | float:
        """A term that is added to the loss."""
        return 0.0

    def optimizer(
        self,
        params: Iterable[nn.Parameter],
        default: Callable[[Iterable[nn.Parameter]], Optimizer],
    ) -> Optimizer:
        """The optimizer of the trainable parameters; by default the configured one."""
        return default(params)

    def restructure(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Give a freshly attached model a checkpoint's structure, before its tensors are loaded.

        Ranks need no help: layers are shrunk to what is saved.

        Args:
            model: The adapted model.
            state: What :meth:`state_dict` gave.
        """

    def final_parameters(self, model: nn.Module) -> int | None:
        """How many values train at the end of a run, as far as arguments tell.

        Args:
            model: Attached and thrown away afterwards, so that it may be changed; usually on the
                meta device.

        Returns:
            The count with modules that train beside the adapters; None where only data decide.
        """
        return trainable_parameters(model, include_saved=True)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the tensors: plain values and tensors only."""
        return {"decisions": list(self.decisions)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.decisions = list(state_dict["decisions"])

    def merge_states(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """What a checkpoint keeps of the states of all processes; the first's, if all are alike."""
        return states[0]

    # What all methods share.

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Freeze a model and put adapters beside its target linears.

        Args:
            model: Changed in place.
            initialize: Whether to start the adapters; False where a saved state is loaded next.

        Returns:
            What was done, for printing.

        Raises:
            UserError: If a pattern matches nothing, the strategy is attached already, or the model
                has adapters already.
        """
        if self.model is not None:
            raise UserError(
                f"this {type(self).__name__} is attached already; make one for each model."
            )
        if adapter_layers(model):
            raise UserError(
                "the model has adapters already; merge them, or load the bare base model."
            )
        matched = match_targets(
            model, self.target_modules, self.exclude_modules, self.modules_to_save
        )
        saved = self._saved_modules(model)
        self.base_fingerprint = fingerprint(model, without=saved)
        model.requires_grad_(False)
        names = [name for group in matched.values() for name in group]
        layers = replace_linears(model, names, self.layer)
        if self.share_dropout:
            share_draws(module for layer in layers.values() for module in layer.modules())
        for layer in layers.values() if initialize else ():
            self.initialize(layer)
        for module in saved:
            module.requires_grad_(True)
        self.model = model
        self._watch_optimizer(model)
        counts = {pattern: len(group) for pattern, group in matched.items()}
        return make_report(model, type(self).__name__, counts)

    def note(self, step: int, layer: str, event: str, rank: int) -> None:
        """Remember a decision, for the record and the pictures.

        Args:
            step: Optimizer step, 0-based.
            layer: Full name.
            event: One word: ``removed``, ``shared``, …
            rank: Of the layer afterwards.
        """
        self.decisions.append({"step": step, "layer": layer, "event": event, "rank": rank})

    def _saved_modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules that train in full, found before anything is changed."""
        saved: list[nn.Module] = []
        for pattern in self.modules_to_save or []:
            found = [
                module
                for name, module in model.named_modules()
                if name == pattern or name.endswith(f".{pattern}")
            ]
            if not found:
                raise UserError(f"modules_to_save: {pattern!r} matches no module of the model.")
            saved += found
        return saved

    # A method that acts at steps must not stay LoRA in silence because nobody calls it.

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note every call of an overridden ``before_step`` or ``after_step``."""
        super().__init_subclass__(**kwargs)
        for name in ("before_step", "after_step"):
            if name in vars(cls):
                setattr(cls, name, _noted(vars(cls)[name]))

    def _needed_calls(self, model: nn.Module) -> set[str]:
        own = type(self)
        needed = {
            name
            for name in ("before_step", "after_step")
            if getattr(own, name) is not getattr(AdapterStrategy, name)
        }
        return needed | {"after_step"} if _step_masks(model) else needed

    def _watch_optimizer(self, model: nn.Module) -> None:
        self._needed, self._steps = self._needed_calls(model), 0
        self._stepping: set[int] = set()
        if self._needed:
            self._layers = list(adapter_layers(model).values())
            _watch(self)

    def _stepped(self, optimizer: Optimizer) -> None:
        own = {id(p) for layer in self._layers for p in own_parameters(layer)}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            return
        # Where several optimizers share the adapters, the step is over when the first steps again.
        if id(optimizer) not in self._stepping:
            self._stepping.add(id(optimizer))
            if len(self._stepping) > 1:
                return
        else:
            self._stepping = {id(optimizer)}
        self._steps += 1
        missing = self._needed - self._noted - ({"after_step"} if self._steps == 1 else set())
        self._noted.clear()
        if missing:
            calls = " and ".join(sorted(missing, reverse=True))
            raise RuntimeError(
                f"{type(self).__name__} acts at every step, but {calls} was "
                "not called: call strategy.before_step(model, optimizer, step) before each "
                "optimizer.step() and strategy.after_step(model, optimizer, step) after it, or "
                "have the strategy among the trainer's callbacks."
            )

    # Lightning calls the methods above.

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
                self.assert_agreement(step)
        self._last_step = max(step, self._last_step)

    def assert_agreement(self, step: int) -> None:
        """Raise if processes have come to other ranks or shared layers; cheap where they agree."""
        assert self.model is not None
        first: dict[int, str] = {}
        structure = {
            name: [layer.rank, first.setdefault(id(layer.lora_A), name)]
            for name, layer in adapter_layers(self.model).items()
        }
        distributed.assert_agreement(step, structure, "ranks and sharing")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin after the steps that a resumed run has made already."""
        self._last_step, self._steps = trainer.global_step - 1, 0
        if self.model is not None:
            self.assert_agreement(trainer.global_step)
