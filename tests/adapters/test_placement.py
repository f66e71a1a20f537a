"""Adapters of a base without values are made where they are asked to be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft.adapters import LoRALinear
from lightning_peft.adapters.placement import adapter_device, adapters_on

CPU, META = torch.device("cpu"), torch.device("meta")


def test_a_base_with_values_has_its_adapters_beside_it() -> None:
    weight = torch.ones(2, 2)
    with adapters_on(META):
        assert adapter_device(weight) == CPU


def test_a_base_on_meta_has_them_where_the_block_says() -> None:
    weight = torch.ones(2, 2, device="meta")
    assert adapter_device(weight) == META
    with adapters_on(CPU):
        assert adapter_device(weight) == CPU
        with adapters_on(META):
            assert adapter_device(weight) == META
        assert adapter_device(weight) == CPU
        layer = LoRALinear(nn.Linear(3, 2, device="meta"), 2, 2)
    assert layer.lora_A.device == CPU
    assert layer.lora_A.any()
    assert layer.weight.is_meta


def test_an_error_in_the_block_ends_it_too() -> None:
    def fail() -> None:
        with adapters_on(CPU):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert adapter_device(torch.ones(1, device="meta")) == META
