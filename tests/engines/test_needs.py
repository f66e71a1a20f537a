"""What engines cannot do is refused at the start, in one sentence that says who can."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn

from lightning_peft import engines
from lightning_peft.strategies import AdaLoRA, DoRA, GaLore, LoRA, LoRADrop, LoRAPrune

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "adapter", "sentence"),
    [
        (2, AdaLoRA(), "AdaLoRA needs whole steps, which DeepSpeed ZeRO-2 holds in shares; one "),
        (3, GaLore(), "GaLore needs whole steps and whole weights, which DeepSpeed ZeRO-3 holds"),
        (3, DoRA(), "one device, DDP, DeepSpeed ZeRO-1 and DeepSpeed ZeRO-2 can run it"),
    ],
)
def test_a_method_that_an_engine_cannot_serve_is_told_which_can(
    stage: int, adapter: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        engines.check(engines.DeepSpeed(stage=stage), adapter)


def test_fsdp_does_not_serve_adalora() -> None:
    with pytest.raises(ValueError, match=r"FSDP2 holds in shares; one device and DDP can run it\."):
        engines.check(engines.FSDP(), AdaLoRA())


@pytest.mark.parametrize(("engine", "name"), [(DDPStrategy(), "DDP"), (engines.FSDP(), "FSDP2")])
def test_what_changes_sizes_runs_on_one_device_alone(engine: Any, name: str) -> None:
    engines.check(SingleDeviceStrategy(), LoRAPrune())
    with pytest.raises(ValueError, match="LoRAPrune") as error:
        engines.check(engine, LoRAPrune())
    assert str(error.value) == (
        f"LoRAPrune changes the sizes of weights, which {name} keeps; one device can run it."
    )


@pytest.mark.parametrize("engine", [SingleDeviceStrategy(), DDPStrategy()])
def test_one_device_and_ddp_serve_every_method(engine: Any) -> None:
    for adapter in (LoRA(), AdaLoRA(), GaLore(), DoRA(), LoRADrop()):
        engines.check(engine, adapter)


def test_lightnings_own_fsdp_is_referred_to_ours() -> None:
    with pytest.raises(ValueError, match=r"give lightning_peft.engines.FSDP .*fsdp.yaml"):
        engines.check(FSDPStrategy(), LoRA())


@needs_deepspeed
def test_lightnings_own_deepspeed_is_referred_to_ours() -> None:
    sentence = r"Lightning's DeepSpeedStrategy go to no .*engines.DeepSpeed .*deepspeed_z2.yaml"
    with pytest.raises(ValueError, match=sentence):
        engines.check(DeepSpeedStrategy(), LoRA())


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        (SingleDeviceStrategy(), "one device"),
        (DDPStrategy(), "DDP"),
        (ModelParallelStrategy(), "FSDP2"),
        (FSDPStrategy(), "DDP"),  # which is refused before it is named
    ],
)
def test_lightnings_own_engines_keep_weights_whole_until_they_wrap_the_model(
    engine: Any, name: str
) -> None:
    traits, model = engines.traits(engine), nn.Linear(2, 2)
    assert traits.name == name
    answers = (traits.cuts_when_building, traits.fills_shares, traits.restores_late)
    assert answers == (False, False, False)
    weight = model.weight
    traits.cut(model)
    traits.cut_parameter(weight)
    assert model.weight is weight


@needs_deepspeed
def test_lightnings_deepspeed_is_named_by_its_stage() -> None:
    assert engines.traits(DeepSpeedStrategy(stage=3)).name == "DeepSpeed ZeRO-3"


def test_our_engines_answer_themselves() -> None:
    engine = engines.FSDP()
    assert engines.traits(engine) is engine


def test_every_name_says_what_its_engine_gives() -> None:
    all_of_them = {engines.WHOLE_WEIGHTS, engines.WHOLE_STEPS, engines.CHANGING_SIZES}
    assert engines.ENGINES["one device"] == all_of_them
    assert engines.ENGINES[engines.FSDP().name] == set()
