"""What engines cannot do is refused at the start, in one sentence that says who can."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy

from lightning_peft import distributed, engines
from lightning_peft.callbacks import Checkpoints
from lightning_peft.runs import read_checkpoint
from lightning_peft.strategies import AdaLoRA, DoRA, GaLore, LoRA, LoRADrop

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


@pytest.mark.parametrize("engine", [SingleDeviceStrategy(), DDPStrategy()])
def test_one_device_and_ddp_serve_every_method(engine: Any) -> None:
    for adapter in (LoRA(), AdaLoRA(), GaLore(), DoRA(), LoRADrop()):
        engines.check(engine, adapter)


def test_lightnings_own_fsdp_is_referred_to_ours() -> None:
    with pytest.raises(ValueError, match=r"give lightning_peft.engines.FSDP .*fsdp.yaml"):
        engines.check(FSDPStrategy(), LoRA())


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


def test_a_checkpoint_of_another_number_of_processes_where_exactness_is_asked_for() -> None:
    trainer: Any = SimpleNamespace(world_size=1)
    saved = {"random_state": [{}, {}]}
    Checkpoints().on_load_checkpoint(trainer, None, saved)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpoint is of 2 processes, this run has 1; give as"):
        Checkpoints(exact_resume=True).on_load_checkpoint(trainer, None, saved)  # type: ignore[arg-type]


def test_a_folder_of_shards_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder of shards that another program wrote"):
        read_checkpoint(tmp_path)


def test_a_port_in_use_and_a_lost_process_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    taken = RuntimeError("The server socket has failed to listen … port: 29500, EADDRINUSE")
    assert "the port 29500, by which the processes find each other" in str(engines.explain(taken))
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:540] Connection closed by peer [127.0.0.1]")
    assert "another process of this job has ended" in str(engines.explain(lost))
    assert engines.explain(ValueError("something else")) is None


def test_processes_that_disagree_are_named_with_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [{"a": [1], "b": [0, 1]}, {"a": [1], "b": [0, 2]}]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "everywhere", lambda value: held)
    monkeypatch.setattr(distributed, "_device", lambda: torch.device("cpu"))
    differing = SimpleNamespace(
        all_reduce=lambda tensor, op: tensor.add_(1), ReduceOp=torch.distributed.ReduceOp
    )
    monkeypatch.setattr(distributed, "distributed", differing)
    with pytest.raises(
        RuntimeError, match=r"at step 7: for b process 0 has \[0, 1\], process 1 has \[0, 2\]"
    ):
        distributed.assert_agreement(7, held[0], "the components to remove")
