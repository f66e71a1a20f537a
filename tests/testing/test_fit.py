"""A Lightning run and its resume find what a plain loop does not."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.strategies import AdapterStrategy, LoRA
from lightning_peft.testing.fit import check_fit


class CountsBatches(AdapterStrategy):
    """Acts by a count that no checkpoint holds, in a hook that only Lightning calls."""

    count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.count += 1
        if self.count > 10 and self.model is not None:
            for layer in adapter_layers(self.model).values():
                layer.lora_B.data.mul_(1.1)


class Stops(AdapterStrategy):
    def on_train_start(self, *args: Any) -> None:
        raise KeyError("nothing here")


class RefusesToLoad(AdapterStrategy):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise ValueError("not mine")


class ForgetsDecisions(AdapterStrategy):
    def after_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        super().after_step(model, optimizer, global_step)
        self.note(global_step, "q", "seen", None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (
            CountsBatches,
            "CountsBatches: a Lightning run resumed .* ends with another .*lora_[AB] than",
        ),
        (Stops, "Stops: a Lightning run fails with KeyError: 'nothing here'"),
        (RefusesToLoad, "RefusesToLoad: a resumed Lightning run fails with ValueError: not mine"),
        (ForgetsDecisions, "ForgetsDecisions: a resumed Lightning run remembers other decisions"),
    ],
)
def test_what_only_a_lightning_run_shows_is_named(strategy, sentence) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_fit(lambda: strategy(r=2, target_modules=["q_proj"]))


def test_it_is_quiet_and_gives_python_its_random_numbers_back(caplog, recwarn, tmp_path) -> None:
    random.seed(3)
    expected = random.random()
    random.seed(3)
    level = logging.getLogger("lightning.pytorch").level
    with torch.random.fork_rng():
        check_fit(lambda: LoRA(r=2, target_modules=["q_proj"]))
    assert random.random() == expected
    assert logging.getLogger("lightning.pytorch").level == level
    assert not caplog.records
    assert not recwarn.list
