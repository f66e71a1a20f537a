"""The schedule, and what is refused of an optimizer before a model is loaded."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.plugins import MixedPrecision, Precision

from lightning_peft.errors import UserError
from lightning_peft.modules.optimization import check_callbacks, check_training, with_schedule

FUSED = partial(torch.optim.AdamW, fused=True)


def trainer(precision: Precision, clip: float | None = None) -> Any:
    return SimpleNamespace(precision_plugin=precision, gradient_clip_val=clip)


def test_gradients_that_a_fused_step_would_unscale_too_late_are_refused() -> None:
    scaled = trainer(MixedPrecision("16-mixed", "cpu"))
    with pytest.raises(ValueError, match="16-mixed a fused step unscales gradients by itself"):
        check_training(FUSED, "linear", scaled)
    check_training(torch.optim.AdamW, "linear", scaled)


def test_clipping_that_lightning_refuses_a_fused_step_is_told_at_the_start() -> None:
    mixed = MixedPrecision("bf16-mixed", "cpu")
    with pytest.raises(ValueError, match="or trainer.gradient_clip_val to null"):
        check_training(FUSED, "linear", trainer(mixed, 1.0))
    check_training(FUSED, "linear", trainer(mixed))
    check_training(FUSED, "linear", trainer(Precision(), 1.0))


def optimizer() -> Any:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("warmup", [4, 0.2])
def test_a_warm_up_is_a_number_or_a_share_of_the_steps(warmup: float) -> None:
    made = with_schedule(optimizer(), "linear", warmup, 20)
    schedule, rates = made["lr_scheduler"]["scheduler"], []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        made["optimizer"].step()
        schedule.step()
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert rates[5:] == pytest.approx([1 - i / 16 for i in range(1, 16)])
    assert made["lr_scheduler"]["interval"] == "step"


def test_a_schedule_that_needs_an_end_is_refused_without_one() -> None:
    with pytest.raises(ValueError, match="^model.lr_scheduler_type 'linear': "):
        with_schedule(optimizer(), "linear", 0, float("inf"))
    with_schedule(optimizer(), "constant", 0, float("inf"))


def test_an_unknown_schedule_is_compared_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'linaer' is no schedule; did you mean linear?"):
        check_training(torch.optim.AdamW, "linaer", trainer(Precision()))


def test_an_optimizers_own_refusal_is_told() -> None:
    with pytest.raises(ValueError, match="^model.optimizer: Invalid learning rate"):
        check_training(partial(torch.optim.AdamW, lr=-1.0), "linear", trainer(Precision()))


@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        (
            EMAWeightAveraging(),
            "trainer.callbacks: EMAWeightAveraging averages a copy of the whole",
        ),
        (StochasticWeightAveraging(0.1), "StochasticWeightAveraging averages a copy of the whole"),
        (LearningRateFinder(), "LearningRateFinder sets a rate that no setting says; try rates by"),
        (
            BatchSizeFinder(),
            "BatchSizeFinder sets a size that no setting says; give data.batch_size",
        ),
    ],
)
def test_callbacks_that_change_a_run_behind_its_settings_are_refused(
    callback: Any, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        check_callbacks(SimpleNamespace(callbacks=[Timer(), callback]))  # type: ignore[arg-type]
    check_callbacks(SimpleNamespace(callbacks=[Timer()]))  # type: ignore[arg-type]
