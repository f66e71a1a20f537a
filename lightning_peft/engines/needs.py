"""What an engine gives a strategy, what else is asked of it, and who is refused."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
)
from torch import nn

from lightning_peft.errors import UserError
from lightning_peft.strategies.base import AdapterStrategy

# What an engine gives a strategy; see AdapterStrategy.needs.
WHOLE_WEIGHTS, WHOLE_STEPS = "whole weights", "whole steps"
CHANGING_SIZES = "changing sizes"
# Which every engine gives, if need be by loading the base whole before it is cut.
WEIGHTS_AT_ATTACH = "weights at attach"
ENGINES = {
    "one device": {WHOLE_WEIGHTS, WHOLE_STEPS, CHANGING_SIZES},
    "DDP": {WHOLE_WEIGHTS, WHOLE_STEPS},
    "DeepSpeed ZeRO-1": {WHOLE_WEIGHTS},
    "DeepSpeed ZeRO-2": {WHOLE_WEIGHTS},
    "DeepSpeed ZeRO-3": set(),
    "FSDP2": set(),
}


class Traits:
    """What is asked of an engine; the answers here are those of one that keeps weights whole."""

    @property
    def name(self) -> str:
        """Its name in sentences and in :data:`ENGINES`."""
        raise NotImplementedError

    @property
    def cuts_when_building(self) -> bool:
        """Whether weights are in shares for good as soon as the model is built.

        Such a model cannot look at data before training, nor be validated before it is fitted.
        """
        return False

    @property
    def fills_shares(self) -> bool:
        """Whether a model without values can be cut, for each process to read its own share."""
        return False

    @property
    def restores_late(self) -> bool:
        """Whether a checkpoint is loaded only after the engine has wrapped the model."""
        return False

    def cut(self, model: nn.Module) -> None:
        """Cut an adapted model's weights now, if the engine cuts models itself."""

    def cut_parameter(self, parameter: nn.Parameter) -> None:
        """Cut one parameter now, if the engine cuts single ones."""


class _Lightnings(Traits):
    """The traits of an engine of Lightning's own."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @property
    def name(self) -> str:
        """By its kind."""
        if isinstance(self._engine, DeepSpeedStrategy):
            return zero_name(self._engine)
        if isinstance(self._engine, ModelParallelStrategy):
            return "FSDP2"
        return "DDP" if isinstance(self._engine, ParallelStrategy) else "one device"


def traits(engine: Any) -> Traits:
    """What is asked of a trainer's strategy, ours or Lightning's."""
    return engine if isinstance(engine, Traits) else _Lightnings(engine)


def zero_name(engine: DeepSpeedStrategy) -> str:
    """The name of a DeepSpeed, by the stage in its configuration."""
    return f"DeepSpeed ZeRO-{engine.config['zero_optimization']['stage']}"  # type: ignore[index]


def check(engine: Any, adapter: AdapterStrategy) -> None:
    """Refuse what an engine cannot run, before anything is loaded.

    Args:
        engine: The trainer's strategy.
        adapter: The method.

    Raises:
        UserError: In one sentence that names those that can.
    """
    if not isinstance(engine, Traits):
        _refuse_other_checkpoints(engine)
    present = traits(engine).name
    needs = adapter.needs - {WEIGHTS_AT_ATTACH}
    missing = needs - ENGINES[present]
    if missing:
        able = [name for name, gives in ENGINES.items() if needs <= gives]
        shown = " and ".join([", ".join(able[:-1]), able[-1]]) if able[1:] else able[0]
        if CHANGING_SIZES in missing:
            what = f"changes the sizes of weights, which {present} keeps"
        else:
            what = f"needs {' and '.join(sorted(missing))}, which {present} holds in shares"
        raise UserError(f"{type(adapter).__name__} {what}; {shown} can run it.")


def _refuse_other_checkpoints(engine: Any) -> None:
    """Refuse those engines of Lightning's whose checkpoints no other engine reads."""
    if isinstance(engine, DeepSpeedStrategy):
        use, file = "lightning_peft.engines.DeepSpeed", "deepspeed_z2.yaml"
    elif isinstance(engine, (FSDPStrategy, ModelParallelStrategy)):
        use, file = "lightning_peft.engines.FSDP", "fsdp.yaml"
    elif isinstance(engine, ParallelStrategy) and not isinstance(engine, DDPStrategy):
        use, file = "ddp", "ddp.yaml"
    else:
        return
    raise UserError(
        f"trainer.strategy: checkpoints of Lightning's {type(engine).__name__} go to no other "
        f"engine; give {use} (--config configs/trainer/{file}, laid over the experiment)."
    )
