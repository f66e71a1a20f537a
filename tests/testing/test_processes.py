"""Several processes that train one strategy end alike, or it is said how they differ."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import pytest
from torch import nn

from lightning_peft.strategies import AdapterStrategy, DropLoRA, LoRA, PrunedLoRA, StepMask
from lightning_peft.testing import check_strategy
from lightning_peft.testing.processes import check_processes

Pruned = functools.partial(PrunedLoRA, r=6, target_r=2, prune_every=3)


step_mask = functools.partial(StepMask, p=0.3)


def test_two_processes_agree() -> None:
    # Their masks differ, their averaged gradients do not.
    check_strategy(Pruned(recovery="gradient", allocation="global", rank_gate=step_mask), ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["token", "learned"])
def test_two_processes_agree_under_droplora(mask: Any) -> None:
    check_strategy(DropLoRA(r=4, mask=mask, lora_dropout=0.1), ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["wanda", "random"])
def test_two_processes_agree_on_what_each_sees_for_itself(criterion: Any) -> None:
    check_strategy(Pruned(criterion=criterion), ranks=2)


def test_what_cannot_be_pickled_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be sent to another process .*no lambda"):
        check_strategy(LoRA(r=2, rank_gate=lambda r: nn.Identity()), ranks=2)


def test_a_class_from_main_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = type("Mine", (AdapterStrategy,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Mine", mine, raising=False)
    with pytest.raises(ValueError, match="Mine uses a class or function from __main__"):
        check_strategy(mine(r=2), ranks=2)


DISAGREEING = """
import torch
from lightning_peft.adapters import adapter_layers, keep_components
from lightning_peft.strategies import AdapterStrategy


class OwnDraw(AdapterStrategy):
    def before_step(self, model, optimizer, step):
        for name, layer in adapter_layers(model).items():
            if step == 3:
                keep_components(layer, torch.randperm(layer.rank)[:2].sort().values, optimizer)
"""


@pytest.mark.slow
def test_processes_that_decide_by_a_draw_of_their_own_are_told_so(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disagreeing_strategy.py").write_text(DISAGREEING)
    monkeypatch.syspath_prepend(tmp_path)
    strategy = importlib.import_module("disagreeing_strategy").OwnDraw
    with pytest.raises(AssertionError, match="OwnDraw: two processes end with different values of"):
        check_processes(lambda: strategy(r=4), 2)
