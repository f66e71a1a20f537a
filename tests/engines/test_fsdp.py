"""What FSDP cuts together; see test_engines.py for its training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_worker
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_peft import engines
from lightning_peft.adapters import adapter_layers
from lightning_peft.engines.fsdp import cut_together
from lightning_peft.strategies import LoRA
from lightning_peft.testing import tiny_llama


class Small(nn.Module):
    """Two blocks between leaves, the last of which may share the first one's weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_each_block_and_each_leaf_outside_of_them_is_cut_by_itself() -> None:
    model = Small()
    groups = cut_together(model, set(model.parameters()))
    assert groups == [[model.embed], [model.blocks[0]], [model.blocks[1]], [model.head]]


def test_what_shares_a_parameter_is_cut_together() -> None:
    model = Small(tied=True)
    groups = cut_together(model, set(model.parameters()))
    assert groups == [[model.blocks[0]], [model.blocks[1]], [model.embed, model.head]]


def test_what_has_none_of_the_parameters_is_left_out() -> None:
    model = Small()
    assert cut_together(model, {model.head.weight}) == [[model.head]]


def test_it_cuts_models_itself_and_reads_shares() -> None:
    engine = engines.FSDP()
    assert engine.name == "FSDP2"
    assert engine.fills_shares
    assert engine.restores_late
    assert not engine.cuts_when_building


def cut(name: str, index: int, folder: Path) -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    model = tiny_llama()
    LoRA(r=4).attach(model)
    engine: Any = SimpleNamespace(device_mesh={"data_parallel": mesh})
    engines.FSDP.cut(engine, model)
    adapters = {name: layer.lora_A for name, layer in adapter_layers(model).items()}
    return {
        "cut": {isinstance(p, DTensor) for p in model.parameters()},
        "rows": {len(p.to_local()) for p in adapters.values()},
    }


def test_base_and_adapters_are_cut(tmp_path: Path) -> None:
    for found in engine_worker.launch(cut, "cut", tmp_path):
        assert found == {"cut": {True}, "rows": {2}}
