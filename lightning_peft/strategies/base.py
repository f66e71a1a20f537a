"""The interface of every method: what stands beside a linear, and what happens at each step.

It is longer than other files because it is the reference of all that a method may override; most
of it is documentation. What calls these methods is in :mod:`.hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.attach import (
    AttachReport,
    adapter_layers,
    find_modules,
    make_report,
    match_targets,
    replace_linears,
)
from lightning_peft.adapters.by_name import ByName, check_alphas, check_patterns
from lightning_peft.adapters.dropout import share_draws
from lightning_peft.adapters.gates import step_gates
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.state import fingerprint, trainable_parameters
from lightning_peft.errors import UserError
from lightning_peft.strategies.hooks import StepHooks
from lightning_peft.strategies.signatures import (
    MakeOptimizer,
    NamedParameters,
    with_name,
    with_names,
)

MakeGate = Callable[[int], nn.Module]
Sample = Callable[[float], Iterable[Any]]
Loss = Callable[[Any], Tensor]


def _step_gates(model: nn.Module) -> list[Any]:
    """The parts of gates that act at optimizer steps."""
    return [part for layer in adapter_layers(model).values() for part in step_gates(layer.gate)]


class AdapterStrategy(StepHooks):
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
        rank_pattern: Ranks of layers that differ from ``r``, by the end of their full names or a
            regex of it; the first pattern that matches counts, as in PEFT.
        alpha_pattern: The same for ``lora_alpha``.
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
        UserError: If a rank is below 1, ``lora_dropout`` lies outside [0, 1), an alpha is no finite
            number above zero, or a pattern no regular expression.
    """

    # What a method must have of its engine, whatever it is: "whole weights" (outside of a layer's
    # forward pass too), "whole steps" (the optimizer and after_step see parameters, gradients and
    # state as they are on one device), "changing sizes" (of the base's weights, which one device
    # alone allows), "weights at attach" (the base's values when adapters are put beside it, which
    # is therefore loaded whole before it is cut). Checked when a run starts.
    needs: ClassVar[frozenset[str]] = frozenset()

    # Whether ranks change while it trains. An optimizer whose state cannot follow (8-bit, factored)
    # is then refused at its first step, and not when the first component leaves or comes.
    changes_ranks: ClassVar[bool] = False

    # What to do where an engine has cut the weights before :meth:`prepare` could look at data.
    instead_of_data: ClassVar[str] = "run it on one device, with DDP or ZeRO-2"

    # Whether the model begins equal to its base, as it does unless a method's start moves it.
    begins_at_base: ClassVar[bool] = True

    # The form of the adapted layer, for a method that differs from LoRA in its form alone.
    layer_class: ClassVar[type[LoRALinear]] = LoRALinear

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
        rank_gate: MakeGate | None = None,
        share_dropout: bool = False,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        ranks = {"r": r, **{f"rank_pattern {k!r}": v for k, v in (rank_pattern or {}).items()}}
        for key, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool):
                raise UserError(f"{key} must be a whole number, got {rank!r}.")
            if rank < 1:
                raise UserError(f"{key} must be at least 1, got {rank}.")
        if not 0 <= lora_dropout < 1:
            raise UserError(f"lora_dropout must lie in [0, 1), got {lora_dropout}.")
        self.r = r
        self.lora_alpha = 2 * r if lora_alpha is None else lora_alpha
        check_alphas(self.lora_alpha, alpha_pattern)
        self.lora_dropout = lora_dropout
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        self.modules_to_save = modules_to_save
        self.use_rslora = use_rslora
        self.init_lora_weights = init_lora_weights
        self.rank_gate = rank_gate
        self.share_dropout = share_dropout
        self.rank_pattern, self.alpha_pattern = rank_pattern or {}, alpha_pattern or {}
        self._ranks = ByName("rank_pattern", rank_pattern)
        self._alphas = ByName("alpha_pattern", alpha_pattern)
        self.base_fingerprint = ""
        self.decisions: list[dict[str, Any]] = []

    # What a method may override.

    def gate(self, r: int) -> nn.Module | None:
        """What stands between A and B: a module on rank activations (..., r), or nothing.

        In eval it must be a fixed diagonal. See :mod:`lightning_peft.adapters.gates`.
        """
        return self.rank_gate(r) if self.rank_gate is not None else None

    def layer(self, base: nn.Module, name: str) -> nn.Module:
        """What stands in the place of a linear.

        By default a :attr:`layer_class` with :meth:`lora_arguments`. A method whose ranks differ by
        layer says so here::

            def layer(self, base, name):
                return LoRALinear(base, **self.lora_arguments(name=name, r=self.found[name]))

        Args:
            base: The linear.
            name: Its full name.

        Returns:
            An adapted layer over it (:class:`lightning_peft.adapters.AdaptedLayer`), or the linear
            itself.
        """
        return self.layer_class(base, **self.lora_arguments(name=name))

    def lora_arguments(self, r: int | None = None, name: str = "") -> dict[str, Any]:
        """The arguments of a :class:`LoRALinear` by this strategy's own, a fresh gate among them.

        Args:
            r: Rank of the layer; when None that of ``rank_pattern``, or the strategy's.
            name: Full name of the layer, by which the patterns apply.
        """
        r = self._ranks.of(name, self.r) if r is None else r
        return {
            "r": r,
            "lora_alpha": self._alphas.of(name, self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "gate": self.gate(r),
        }

    def initialize(self, layer: Any) -> None:
        """Set a layer's parameters before training; the layer should equal its base.

        Args:
            layer: What :meth:`layer` made.
        """
        if isinstance(layer, LoRALinear):
            layer.reset_parameters(self.init_lora_weights)

    @property
    def looks_at_data(self) -> bool:
        """Whether :meth:`prepare` will ask for data, so that the base has to be whole by then.

        Until it has, or a saved state has been loaded, no optimizer may step.
        """
        return type(self).prepare is not AdapterStrategy.prepare

    def prepare(
        self,
        model: nn.Module,
        sample: Sample,
        loss: Loss,
        optimizer: MakeOptimizer = torch.optim.AdamW,
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

    def before_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Act after the backward pass and before the optimizer's step ``global_step`` (0-based).

        Gradients are those of the whole accumulation window, unscaled and not yet clipped. Where an
        engine keeps them elsewhere ``parameter.grad`` is None or a share:
        :func:`lightning_peft.distributed.gradient` gives the full one everywhere.
        """

    def after_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Act after the optimizer's step ``global_step`` (0-based); overriders call ``super()``."""
        for gate in _step_gates(model):
            gate.new_step()

    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """‖ΔW‖_F by full name, scalars, of weights that train themselves; adapters say their own.

        A method without adapters has no other importance to watch.
        """
        return {}

    def penalty(self, model: nn.Module) -> Tensor | float:
        """A term that is added to the loss."""
        return 0.0

    def optimizer(self, named_parameters: NamedParameters, default: MakeOptimizer) -> Optimizer:
        """The optimizer of the trainable parameters; by default the configured one.

        Groups can be made by name (LoRA+, https://arxiv.org/abs/2402.12354)::

            def optimizer(self, named_parameters, default):
                A, B = [], []
                for name, parameter in named_parameters:
                    (B if name.endswith("_B") else A).append(parameter)
                return default([{"params": A}, {"params": B, "lr": self.rate_of_B}])

        Args:
            named_parameters: Full names and parameters, those that train.
            default: Makes the configured optimizer, from parameters or from groups of them.
        """
        return default([parameter for _, parameter in named_parameters])

    def make_optimizer(self, model: nn.Module, default: MakeOptimizer) -> Optimizer:
        """Call :meth:`optimizer` with what trains in a model, in the model's order."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return with_names(self.optimizer)(named, default)

    def restructure(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Give a freshly attached model a checkpoint's structure, before its tensors are loaded.

        Ranks need no help: layers are shrunk to what is saved.

        Args:
            model: The adapted model.
            state: What :meth:`state_dict` gave.
        """

    def final_parameters(self, model: nn.Module) -> int | None:
        """How many values train at the end of a run, as far as arguments tell.

        By default as many as at the start. A method that removes or adds some says its own count,
        since a comparison at an equal budget chooses ranks by it (and counts again at each end).

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
        saved = find_modules(model, self.modules_to_save or ())
        self.base_fingerprint = fingerprint(model, without=saved)
        model.requires_grad_(False)
        names = [name for group in matched.values() for name in group]
        layers = replace_linears(model, names, with_name(self.layer))
        check_patterns(type(self).__name__, self._ranks, self._alphas, layers)
        if self.share_dropout:
            share_draws(module for layer in layers.values() for module in layer.modules())
        for layer in layers.values() if initialize else ():
            self.initialize(layer)
        for module in saved:
            module.requires_grad_(True)
        self.model = model
        # A method that acts at steps must not stay LoRA in silence because nobody calls it.
        needed = {"after_step"} if _step_gates(model) else set()
        for method in ("before_step", "after_step"):
            if getattr(type(self), method) is not getattr(AdapterStrategy, method):
                needed.add(method)
        looks = self.looks_at_data
        self.watch_calls(model, needed, self._first_step if looks or self.changes_ranks else None)
        for method in ("prepare", "restructure", "load_state_dict") if looks else ():
            self.note_calls("prepare", method)
        counts = {pattern: len(group) for pattern, group in matched.items()}
        return make_report(model, type(self).__name__, counts)

    def _first_step(self, optimizer: Optimizer) -> None:
        """Refuse, after an optimizer's first step, what would be wrong in silence or fail late."""
        assert self._calls is not None
        if self.looks_at_data and "prepare" not in self._calls.ever:
            raise UserError(
                f"{type(self).__name__} looks at data before training, but prepare was not called: "
                "call strategy.prepare(model, sample, loss) after strategy.attach(model) and "
                "before the optimizer is made, or load the strategy's saved state."
            )
        if self.changes_ranks:
            distributed.refuse_packed(self._calls.parameters(), optimizer)

    def note(self, step: int, layer: str, event: str, rank: int | None) -> None:
        """Remember a decision, for the record and the pictures.

        Args:
            step: Optimizer step, 0-based.
            layer: Full name.
            event: One word: ``removed``, ``shared``, …
            rank: Of the layer afterwards; None for a form without ranks.
        """
        self.decisions.append({"step": step, "layer": layer, "event": event, "rank": rank})
