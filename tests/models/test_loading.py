"""What is refused before a model is loaded."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision

from lightning_peft.models.loading import check_training

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
