"""The keepers of ZeRO's stages on two processes: whatever is asked is answered as on one."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_worker
import keeper_worker
import pytest
import torch
from torch import nn

from lightning_peft import distributed
from lightning_peft.distributed.parameters import keeper_of
from lightning_peft.distributed.zero import Zero3, Zero12, mark_flat

STAGES = {1: "Zero12", 2: "Zero12", 3: "Zero3"}


def ask_stages(name: str, index: int, folder: Path) -> dict[int, keeper_worker.Found]:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo", verbose=False)
    return {stage: ask_stage(stage) for stage in STAGES}


def ask_stage(stage: int) -> keeper_worker.Found:
    import deepspeed

    model = keeper_worker.make_model()
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        optimizer=keeper_worker.make_optimizer(model),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        },
    )
    mark_flat(optimizer)
    return keeper_worker.ask(
        model,
        optimizer,
        lambda: engine.backward(keeper_worker.loss_of(engine)),
        engine.step,
    )


def test_every_stage_answers_as_whole_parameters_do(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    plain = keeper_worker.ask_plainly()
    for process in engine_worker.launch(ask_stages, "zero", tmp_path):
        for stage, found in process.items():
            keeper_worker.assert_same(found, plain)
            assert found["kept by"] == {STAGES[stage]}
            assert found["is cut"] == {stage == 3}
            assert found["resizable"] == {False}


def parameters(count: int) -> list[Any]:
    return [nn.Parameter(torch.full((2,), float(i))) for i in range(count)]


def test_the_models_own_parameters_are_found_behind_flat_ones() -> None:
    first, second, third = parameters(3)
    flat = [{"params": parameters(1)}]
    two: Any = SimpleNamespace(bit16_groups=[[first, second], [third]], param_groups=flat)
    three: Any = SimpleNamespace(
        fp16_groups=[[first], [second], [third]],  # the first group is cut into two
        sub_group_to_group_id={0: 0, 1: 0, 2: 1},
        param_groups=flat * 2,
    )
    plain: Any = SimpleNamespace(param_groups=flat)
    assert [len(group) for group in Zero12.groups(two) or ()] == [2, 1]
    assert [len(group) for group in Zero3.groups(three) or ()] == [2, 1]
    assert (Zero12.groups(plain), Zero3.groups(plain), Zero12.groups(three)) == (None, None, None)
    for optimizer in (two, three):
        assert distributed.parameters_of(optimizer)[2] is third


def test_parameters_know_who_has_their_flat_copies() -> None:
    (parameter,) = parameters(1)
    assert not Zero12.keeps(parameter)
    optimizer: Any = SimpleNamespace(bit16_groups=[[parameter]])
    mark_flat(optimizer)
    keeper = keeper_of(parameter)
    assert isinstance(keeper, Zero12)
    assert keeper.zero is optimizer
    mark_flat(SimpleNamespace())  # an optimizer that has none


def test_the_share_that_is_stepped_is_that_of_the_parameters_group() -> None:
    first, second = parameters(2)
    shares = [torch.zeros(3), torch.zeros(5)]
    inner = SimpleNamespace(state={shares[1]: {"step": 4, "exp_avg": torch.ones(5)}})
    zero: Any = SimpleNamespace(
        bit16_groups=[[first], [second]], single_partition_of_fp32_groups=shares, optimizer=inner
    )
    mark_flat(zero)
    assert Zero12(second).stepped() is shares[1]
    assert Zero12(second).holder(zero) is inner
    assert Zero12(second).counters(zero) == {"step": 4}
    assert Zero12(first).counters(zero) == {}
