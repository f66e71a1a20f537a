"""From a base to the model that trains: who loads it whole, who attaches without values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import save_peft
from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.engines import FSDP
from lightning_peft.models.loading import BaseSource, load_causal_lm
from lightning_peft.models.sharded_loading import stored_causal_lm
from lightning_peft.modules.building import Building
from lightning_peft.strategies import AdapterStrategy, LoRA, LoRADrop, PiSSA
from lightning_peft.testing import tiny_llama


class OnCpu(FSDP):
    """FSDP before a trainer has told it its device."""

    root_device = torch.device("cpu")  # type: ignore[assignment]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def build(building: Building, folder: Path) -> Any:
    source = BaseSource(str(folder))
    return building.build(lambda: load_causal_lm(source), lambda: stored_causal_lm(source))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("lightning_peft.modules.building.rank_zero_info", lines.append)
    return lines


def test_without_a_trainer_the_base_is_loaded_whole(folder: Path, said: list[str]) -> None:
    model = build(Building(LoRA(r=2)), folder)
    assert not any(p.is_meta for p in model.parameters())
    assert len(adapter_layers(model)) == 14
    assert len(said) == 1
    assert said[0].startswith("LoRA")
    Building(LoRA()).cut(model)  # nothing to do


def test_an_engine_that_cuts_gets_shapes_and_adapters_with_values(folder: Path) -> None:
    model = build(Building(LoRA(r=2), OnCpu()), folder)
    layers = adapter_layers(model).values()
    assert all(layer.base.weight.is_meta for layer in layers)
    assert not any(layer.lora_A.is_meta or layer.lora_B.is_meta for layer in layers)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter": PiSSA(r=2)}, "PiSSA reads its weights when attached"),
        ({"adapter": LoRADrop(r=2), "prepares": True}, "LoRADrop looks at data before training"),
        ({"peft_path": True}, "model.peft_path puts an adapter on it"),
    ],
)
def test_who_needs_the_values_has_the_base_loaded_whole(
    changes: dict[str, Any], reason: str, folder: Path, tmp_path: Path, said: list[str]
) -> None:
    if "peft_path" in changes:
        saved = tiny_llama()
        LoRA(r=2).attach(saved)
        changes = {"peft_path": str(save_peft(saved, tmp_path / "adapter"))}
    model = build(Building(**{"adapter": LoRA(r=2), "engine": OnCpu(), **changes}), folder)
    assert said[0] == f"each process loads the base whole before it is cut, since {reason}."
    assert not any(p.is_meta for p in model.parameters())
    assert adapter_layers(model)


def test_a_resumed_run_need_not_look_at_data_again(folder: Path, said: list[str]) -> None:
    model = build(Building(LoRADrop(r=2), OnCpu(), ckpt_path="a.ckpt"), folder)
    assert adapter_layers(model)["model.layers.0.mlp.up_proj"].base.weight.is_meta


def test_adapters_begin_unless_a_state_is_loaded_next(folder: Path) -> None:
    class Marked(LoRA):
        begun = 0

        def initialize(self, layer: LoRALinear) -> None:
            self.begun += 1

    for more, begun in (({}, 14), ({"loads_state": True}, 0), ({"ckpt_path": "a.ckpt"}, 0)):
        adapter = Marked(r=2)
        build(Building(adapter, **more), folder)  # type: ignore[arg-type]
        assert adapter.begun == begun


def test_activations_are_recomputed_where_asked(folder: Path) -> None:
    model = build(Building(LoRA(r=2), gradient_checkpointing=True), folder)
    assert model.is_gradient_checkpointing
    assert not build(Building(LoRA(r=2)), folder).is_gradient_checkpointing


def test_a_probe_is_refused_where_weights_are_cut_before() -> None:
    class CutsWhenBuilding(OnCpu):
        cuts_when_building = True

    engine = CutsWhenBuilding()
    Building(LoRADrop(r=2), engine).refuse_probe()  # resumed, or only tested
    Building(LoRA(r=2), engine, prepares=True).refuse_probe()
    with pytest.raises(ValueError, match="LoRADrop looks at data before training, when FSDP2 has"):
        Building(LoRADrop(r=2), engine, prepares=True).refuse_probe()


class ReadsInSilence(AdapterStrategy):
    """Starts B at a column of the weight, and tells nobody."""

    def initialize(self, layer: LoRALinear) -> None:
        super().initialize(layer)
        weight: Any = layer.base.weight
        layer.lora_B.data.copy_(weight[:, : layer.r])


class KeepsInSilence(AdapterStrategy):
    """Keeps a trained value for each row of the weight, and tells nobody."""

    def layer(self, base: nn.Module, name: str) -> nn.Module:
        layer = super().layer(base, name)
        weight: Any = base.weight
        layer.scale = nn.Parameter(weight.norm(dim=1))
        return layer


@pytest.mark.parametrize("strategy", [ReadsInSilence, KeepsInSilence])
def test_a_strategy_that_reads_weights_in_silence_is_told_to_say_so(
    strategy: Any, folder: Path
) -> None:
    with pytest.raises(ValueError, match="and FSDP2 loads them later: add 'weights at attach' to"):
        build(Building(strategy(r=2), OnCpu(), prepares=True), folder)


def test_another_error_of_a_strategy_stays_its_own(folder: Path) -> None:
    class Broken(AdapterStrategy):
        def initialize(self, layer: LoRALinear) -> None:
            torch.ones(2, 3) @ torch.ones(2, 3)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        build(Building(Broken(r=2), OnCpu()), folder)
