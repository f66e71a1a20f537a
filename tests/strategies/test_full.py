"""Full fine-tuning: everything trains, and nothing stands beside the model."""

from __future__ import annotations

import pytest

from lightning_peft.adapters import adapter_layers, merge, save_peft, trainable_parameters
from lightning_peft.strategies import FullFineTuning
from lightning_peft.testing import check_strategy


def test_everything_trains(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    report = FullFineTuning().attach(model)
    count = sum(p.numel() for p in model.parameters())
    assert trainable_parameters(model) == report.trainable == report.total == count
    assert not adapter_layers(model)
    assert "the whole model" in str(report)
    with pytest.raises(ValueError, match="the model has no adapters to merge"):
        merge(model)
    with pytest.raises(ValueError, match="there is nothing to save"):
        save_peft(model, tmp_path)


def test_keeps_a_strategys_promises() -> None:
    check_strategy(FullFineTuning())
