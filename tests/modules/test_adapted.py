"""The module's own part: what it builds once, what a checkpoint holds, how streams begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sums import module, trainer

from lightning_peft.models.checking import BaseSource
from lightning_peft.models.sharded_loading import LoadsWhole
from lightning_peft.modules import adapted
from lightning_peft.modules.adapted import AdaptedModule
from lightning_peft.strategies import LoRA


class Looks(LoRA):
    """Counts how often it is asked to look at data."""

    looked = 0

    def prepare(self, *given: Any) -> None:
        self.looked += 1


def test_a_kind_of_model_says_how_it_is_loaded() -> None:
    plain = AdaptedModule("tiny_llama")
    for say in (plain.load_base, lambda: plain.target_loss({})):
        with pytest.raises(NotImplementedError):
            say()
    with pytest.raises(LoadsWhole, match="AdaptedModule cannot do otherwise"):
        plain.load_shapes()


def test_the_base_comes_as_the_arguments_say() -> None:
    built = AdaptedModule("org/name", dtype="bfloat16", attn_implementation="eager")
    assert built.source() == BaseSource("org/name", "bfloat16", "eager", None, "cpu")


def test_the_model_is_built_once_and_the_strategy_looks_once(make: Any, tmp_path: Path) -> None:
    adapter = Looks(r=2)
    fitted = module(adapter)
    trainer(tmp_path).validate(fitted, datamodule=make(), verbose=False)
    model = fitted.model
    assert adapter.looked == 0
    for steps in (1, 2):
        trainer(tmp_path, max_steps=steps, limit_val_batches=0).fit(fitted, datamodule=make())
    assert fitted.model is model
    assert adapter.looked == 1


def test_a_resumed_run_takes_the_structure_from_its_checkpoint(make: Any, tmp_path: Path) -> None:
    first = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    first.fit(module(Looks(r=2)), datamodule=make())
    first.save_checkpoint(tmp_path / "one.ckpt")
    adapter = Looks(r=2)
    second = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    second.ckpt_path = str(tmp_path / "one.ckpt")  # as the command line sets it
    second.fit(module(adapter), datamodule=make())
    assert second.global_step == 2
    assert adapter.looked == 0


def test_an_adapter_in_pefts_format_is_not_fitted(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.peft_path is for validate, test and predict, not"):
        trainer(tmp_path, max_steps=1).fit(module(peft_path="somewhere"), datamodule=make())


def test_the_random_stream_begins_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted.distributed, "process_index", lambda: 1)
    drawn = []
    for _ in range(2):
        built = module()
        torch.manual_seed(0)
        built.on_train_batch_start({}, 0)
        drawn.append(torch.rand(2).tolist())
        state = torch.get_rng_state()
        built.on_train_batch_start({}, 1)
        assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert drawn[0] == drawn[1] != torch.rand(2).tolist()


def test_a_checkpoint_holds_what_a_resumed_run_needs(make: Any, tmp_path: Path) -> None:
    run, fitted = trainer(tmp_path, max_steps=1, limit_val_batches=0), module()
    run.fit(fitted, datamodule=make())
    run.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert all("lora_" in name for name in saved["state_dict"])
    assert len(saved["random_state"]) == len(saved["masks"]) == 1
    assert saved["adapter"]["strategy"] == "LoRA"
    built = module()
    built.loads_state = True
    built.configure_model()
    built.on_load_checkpoint(saved)
    built.load_state_dict(saved["state_dict"])
    for name, value in built.model.state_dict().items():
        assert torch.equal(value, fitted.model.state_dict()[name]), name
    # The next batch goes on with the saved stream.
    built.on_train_batch_start({}, 0)
    assert torch.equal(torch.get_rng_state(), saved["random_state"][0]["torch"])
