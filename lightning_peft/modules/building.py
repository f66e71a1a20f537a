"""How a module's model comes to be: loaded, adapted, and cut as the trainer's engine wants it.

Some engines hold the base's weights in shares. Then the base is loaded in one of two ways. Where
nobody needs its values before the cut, each process builds the model without values, cuts it, and
reads its own share (:mod:`lightning_peft.models.sharded_loading`). Else each process loads it whole
and cuts it afterwards; a line of the log says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_peft import engines
from lightning_peft.adapters import load_peft
from lightning_peft.adapters.attach import AttachReport
from lightning_peft.adapters.placement import adapters_on
from lightning_peft.errors import UserError
from lightning_peft.models.liger import apply_liger
from lightning_peft.models.sharded_loading import (
    LoadsWhole,
    NameMissingValues,
    ValuesMissing,
    fill,
    stored_parameters,
)
from lightning_peft.runs import read_checkpoint
from lightning_peft.strategies import AdapterStrategy


@dataclass(frozen=True)
class Building:
    """The way from a base to the model that trains: :meth:`build`, a look at data, :meth:`cut`.

    Attributes:
        adapter: The strategy that is attached.
        engine: The trainer's strategy; None without a trainer, which loads whole and cuts nothing.
        peft_path: An adapter in PEFT's format, in the strategy's place.
        gradient_checkpointing: Recompute activations in the backward pass.
        liger: Compute with Liger's kernels, if there is a trainer.
        ckpt_path: The checkpoint that the trainer loads afterwards.
        loads_state: Whether a checkpoint's state is loaded afterwards without a trainer.
        prepares: Whether the strategy may look at data between the two.
    """

    adapter: AdapterStrategy
    engine: Any = None
    peft_path: str | None = None
    gradient_checkpointing: bool = False
    liger: bool = False
    ckpt_path: Any = None
    loads_state: bool = False
    prepares: bool = False

    def refuse_probe(self) -> None:
        """Refuse a strategy that looks at data where the weights have been cut by then.

        Raises:
            UserError: As said; tells what to give instead.
        """
        if self._probes and engines.traits(self.engine).cuts_when_building:
            raise UserError(
                f"{type(self.adapter).__name__} looks at data before training, when "
                f"{engines.traits(self.engine).name} has cut the weights: "
                f"{self.adapter.instead_of_data}."
            )

    def build(self, whole: Callable[[], Any], shapes: Callable[[], Any]) -> Any:
        """Load a base, put the adapters on it, and say what was done.

        Args:
            whole: Loads the base.
            shapes: Gives the base with its values still in their files, or raises
                :class:`LoadsWhole`.

        Returns:
            The adapted model; without the base's values where each process reads its own share of
            them in :meth:`cut`.

        Raises:
            UserError: If the strategy reads values that are still in their files.
        """
        model = self._load(whole, shapes)
        if self.liger and self.engine is not None:  # elsewhere a model may be on a CPU
            apply_liger(model)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        if self.peft_path is not None:
            load_peft(model, self.peft_path)
        elif stored_parameters(model):
            rank_zero_info(str(self._attach_without_values(model)))
        else:
            rank_zero_info(str(self._attach(model)))
        return model

    def cut(self, model: Any) -> None:
        """Have the engine cut the adapted model, and each process read its share of the base."""
        if self.engine is None:
            return
        engine = engines.traits(self.engine)
        if engine.restores_late and self.ckpt_path is not None:
            # Layers cannot be shared any more once the engine has wrapped them.
            saved = read_checkpoint(self.ckpt_path)
            self.adapter.restructure(model, saved["adapter"]["state"])
        stored = stored_parameters(model)
        engine.cut(model)
        fill(model, stored, self.engine.root_device, engine.cut_parameter)

    def _load(self, whole: Callable[[], Any], shapes: Callable[[], Any]) -> Any:
        if self.engine is None or not engines.traits(self.engine).fills_shares:
            return whole()
        try:
            self._refuse_shares()
            return shapes()
        except LoadsWhole as reason:
            rank_zero_info(f"each process loads the base whole before it is cut, since {reason}.")
            return whole()

    @property
    def _probes(self) -> bool:
        return self.prepares and self.adapter.looks_at_data

    def _refuse_shares(self) -> None:
        """Raise if somebody needs the base's values before it is cut."""
        name = type(self.adapter).__name__
        if self.peft_path is not None:
            raise LoadsWhole("model.peft_path puts an adapter on it")
        if engines.WEIGHTS_AT_ATTACH in self.adapter.needs:
            raise LoadsWhole(f"{name} reads its weights when attached")
        if self._probes:
            raise LoadsWhole(f"{name} looks at data before training")

    def _attach(self, model: Any) -> AttachReport:
        # What a checkpoint brings need not be initialised.
        resumes = self.loads_state or self.ckpt_path is not None
        return self.adapter.attach(model, initialize=not resumes)

    def _attach_without_values(self, model: Any) -> AttachReport:
        """Attach a strategy that reads no weights, as its ``needs`` say; refuse one that does."""
        undeclared = UserError(
            f"{type(self.adapter).__name__} reads the base's weights when it is attached, and "
            f"{engines.traits(self.engine).name} loads them later: add "
            f"{engines.WEIGHTS_AT_ATTACH!r} to its `needs`, to have them loaded before."
        )
        try:
            with adapters_on(self.engine.root_device), NameMissingValues():
                report = self._attach(model)
        except ValuesMissing as error:
            raise undeclared from error
        # What was computed from such weights has no values either, and no file to take them from.
        if any(p.is_meta and not hasattr(p, "stored") for p in model.parameters()):
            raise undeclared
        return report
