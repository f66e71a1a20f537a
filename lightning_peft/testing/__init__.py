"""Does a strategy keep the promises on which checkpoints, merging, export and several devices rest?

:func:`check_strategy` tries a strategy on a small random LLaMA in a plain loop, and raises on the
first promise that it breaks. It takes a second or two, so it can stand in any test::

    def test_my_strategy() -> None:
        check_strategy(MyStrategy(r=4))
"""

from __future__ import annotations

import copy

import torch

from lightning_peft.errors import UserError
from lightning_peft.strategies import AdapterStrategy
from lightning_peft.testing.fit import check_fit
from lightning_peft.testing.loop import SAVED_AFTER, Make
from lightning_peft.testing.model import random_batch, tiny_llama
from lightning_peft.testing.processes import check_processes
from lightning_peft.testing.promises import (
    check_eval,
    check_export,
    check_recomputation,
    check_resume,
    check_start,
    check_training,
)

__all__ = ["check_strategy", "random_batch", "tiny_llama"]


def check_strategy(
    strategy: AdapterStrategy | Make,
    processes: int = 1,
    ranks: int | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Try whether a strategy keeps its promises; returns if it does.

    In this order: it begins equal to the base; only adapters and ``modules_to_save`` train, with
    finite losses, and each trained parameter has a gradient within three steps (twelve behind a
    gate, which may mask it for some); eval is deterministic; what is saved loads again; merged
    equals unmerged; a resumed run ends with the same bits; what is exported gives the same logits
    here and in PEFT, where PEFT knows the form; activation checkpointing changes no gradient; a
    short Lightning run, watched and recorded, ends with the same bits as a resumed one. With more
    processes: as many end with equal parameters, ranks and decisions.

    A run has 12 optimizer steps, so give the strategy a schedule that acts within them.

    Args:
        strategy: Not yet attached; it is copied and stays as it is. Or what makes one.
        processes: How many train together. Above 1 only their agreement is checked.
        ranks: Another name for ``processes``.
        device: Where one process trains, such as ``cuda``.

    Raises:
        AssertionError: On the first promise that is broken, saying which and where.
        UserError: If the strategy is attached already, or cannot be sent to another process; if
            several processes are given a device.

    Example::

        check_strategy(MyStrategy(r=4))
    """
    make = _maker(strategy)
    processes = processes if ranks is None else ranks
    where = _where(device, processes)
    if processes > 1:
        check_processes(make, processes)
        return
    with torch.random.fork_rng():
        check_start(make, where)
        trained = check_training(make, where)
        saved = trained.save()
        check_eval(make, trained, saved)
        for after in SAVED_AFTER:
            check_resume(make, trained, after)
        check_export(make, trained)
        check_recomputation(make, saved, where)
        check_fit(make, where)


def _where(device: str | torch.device, processes: int) -> torch.device:
    where = torch.device(device)
    if processes > 1 and where.type != "cpu":
        raise UserError(f"device {str(device)!r} is for processes=1; several train on the CPU.")
    return where


def _maker(strategy: AdapterStrategy | Make) -> Make:
    if not isinstance(strategy, AdapterStrategy):
        return strategy
    if strategy.model is not None:
        raise UserError(
            f"this {type(strategy).__name__} is attached already; give check_strategy a fresh one."
        )
    return lambda: copy.deepcopy(strategy)
