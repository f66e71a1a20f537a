"""FSDP2's keeper on two processes: whatever is asked is answered as on one."""

from __future__ import annotations

from pathlib import Path

import engine_worker
import keeper_worker
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_peft.distributed.fsdp import Fsdp


def ask_fsdp(name: str, index: int, folder: Path) -> keeper_worker.Found:
    keeper_worker.begin()
    model = keeper_worker.make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = keeper_worker.make_optimizer(model)

    def backward() -> None:
        optimizer.zero_grad()
        keeper_worker.loss_of(model).backward()

    found = keeper_worker.ask(model, optimizer, backward, optimizer.step)
    weight = model[0].weight
    found["rows"] = len(weight.to_local())
    moment = optimizer.state[weight]["exp_avg"]
    whole = torch.arange(15.0).view(5, 3)
    Fsdp(weight).write_share(moment, whole)
    found["share"] = moment.to_local().clone()
    found["read"] = Fsdp(weight).read_share(moment)
    found["whole ones"] = Fsdp(weight).read_share(whole)
    return found


def test_a_cut_parameter_answers_as_a_whole_one(tmp_path: Path) -> None:
    plain, whole = keeper_worker.ask_plainly(), torch.arange(15.0).view(5, 3)
    one, other = engine_worker.launch(ask_fsdp, "fsdp", tmp_path)
    for found in (one, other):
        keeper_worker.assert_same(found, plain)
        assert found["kept by"] == {"Fsdp"}
        assert (found["is cut"], found["resizable"]) == ({True}, {False})
        assert torch.equal(found["read"], whole)
        assert torch.equal(found["whole ones"], whole)
    assert (one["rows"], other["rows"]) == (3, 2)
    assert torch.equal(torch.cat([one["share"], other["share"]]), whole)


def test_it_keeps_dtensors_only() -> None:
    assert not Fsdp.keeps(torch.nn.Parameter(torch.ones(2)))
