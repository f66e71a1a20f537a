"""DeepSpeed's arguments, and what it answers of itself; see test_engines.py for its training."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from torch import nn

from lightning_peft import engines

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def test_deepspeed_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"not installed; pip install 'lightning-peft\[deepspeed\]'"
    ):
        engines.DeepSpeed()


@needs_deepspeed
def test_a_stage_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="stage must be 1, 2 or 3, got 4"):
        engines.DeepSpeed(stage=4)


@needs_deepspeed
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"offload_parameters": True}, "offload_parameters needs stage 3, which cuts them, got 2"),
        ({"offload_optimizer_device": "nvme"}, "offload_optimizer_device must be cpu, got nvme"),
        ({"offload_params_device": "nvme"}, "offload_params_device must be cpu, got nvme"),
    ],
)
def test_offloading_that_cannot_be(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        engines.DeepSpeed(stage=2, **arguments)


@needs_deepspeed
def test_offloading_takes_any_optimizer() -> None:
    config: Any = engines.DeepSpeed(stage=2, offload_optimizer=True).config
    assert config["zero_force_ds_cpu_optimizer"] is False


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stage_3_alone_cuts_weights_when_the_model_is_built(stage: int) -> None:
    engine = engines.DeepSpeed(stage=stage)
    assert engine.name == f"DeepSpeed ZeRO-{stage}"
    assert engine.cuts_when_building == engine.fills_shares == (stage == 3)
    assert engine.restores_late


@needs_deepspeed
def test_earlier_stages_leave_parameters_whole() -> None:
    parameter = nn.Parameter(nn.Linear(2, 2).weight.detach())
    engines.DeepSpeed(stage=2).cut_parameter(parameter)
    assert not hasattr(parameter, "ds_id")


@needs_deepspeed
def test_a_batch_size_in_the_log_is_left_as_given() -> None:
    sizes = []
    for given in ({}, {"logging_batch_size_per_gpu": "auto"}, {"logging_batch_size_per_gpu": 4}):
        config: Any = engines.DeepSpeed(**given).config
        sizes.append(config["train_micro_batch_size_per_gpu"])
    assert sizes == [1, 1, 4]
