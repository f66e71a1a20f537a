"""The keys of classes, so that what a constructor refuses is said with the key that it is about."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.callbacks import Checkpoints, LayerImportance, RunRecord
from lightning_peft.errors import UserError
from lightning_peft.strategies import AdapterStrategy

# Whose constructor may refuse something, and how users write its key; subclasses come first.
KEYS: dict[type, str] = {
    AdapterStrategy: "model.adapter",
    LightningModule: "model",
    LightningDataModule: "data",
    Checkpoints: "checkpoint",
    LayerImportance: "importance",
    RunRecord: "record",
    Callback: "trainer.callbacks",
    Strategy: "trainer.strategy",
    Logger: "trainer.logger",
    Profiler: "trainer.profiler",
    Accelerator: "trainer.accelerator",
    CheckpointIO: "trainer.plugins",
    ClusterEnvironment: "trainer.plugins",
    LayerSync: "trainer.plugins",
    Precision: "trainer.plugins",
    nn.Module: "model.adapter.rank_gate",
}
# The last: a logger or an engine whose package is not installed, which says how to install it.
REFUSALS = (ValueError, MisconfigurationException, ModuleNotFoundError)
Make = Callable[..., Any]


class _Refused(BaseException):
    """A constructor's sentence on its way through jsonargparse.

    No ``Exception``: of a union jsonargparse would try the next type, and say of all of them that
    they do not take the value.
    """


class _Broken(BaseException):
    """Any other error of a constructor on the same way, which keeps its own traceback."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def sentence(error: BaseException, key: str) -> str:
    """What an error says, in one line that begins with the key.

    Args:
        error: The error.
        key: What it is about; not put before a text that names it, or one below it, itself.
    """
    text = " ".join(str(error).split())
    return text if text.startswith((f"{key}.", f"{key}:")) else f"{key}: {text}"


@contextmanager
def refusals_of(key: str) -> Iterator[None]:
    """Within, what a constructor refuses is about one key.

    Raises:
        UserError: As the constructor says it.
    """
    try:
        yield
    except REFUSALS as error:
        raise UserError(sentence(error, key)) from error


@contextmanager
def refusals_by_class() -> Iterator[None]:
    """Within, what constructors refuse that a parser makes is about the keys of their classes.

    Raises:
        UserError: As a constructor says it.
        Exception: As it is, what a constructor raises that is no refusal.
    """
    try:
        yield
    except _Refused as refused:
        raise UserError(str(refused)) from refused.__cause__
    except _Broken as broken:
        raise broken.error from None


def name_refusals(make: Make, cls: type) -> Make:
    """Have an instantiator name the key where a constructor refuses something.

    Args:
        make: Makes an object of a class that is ``cls`` or below it, from the class and arguments.
        cls: One of those with a key; ``make`` stays as it is for others.

    Returns:
        The instantiator, to be used within `refusals_by_class`.
    """
    if cls not in KEYS:
        return make

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        try:
            return make(*args, **kwargs)
        except REFUSALS as error:
            raise _Refused(sentence(error, KEYS[cls])) from error
        except Exception as error:
            raise _Broken(error) from error

    return made
