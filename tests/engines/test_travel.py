"""A checkpoint goes from each engine to each other, and to PEFT: the same model everywhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import engine_worker
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from lightning_peft.commands import export
from lightning_peft.strategies import PrunedLoRA
from lightning_peft.testing import random_batch, tiny_llama

TOGETHER = ("ddp", "zero1", "zero2", "zero3", "fsdp")
SAVED_AFTER = 10  # of two removals out of three
SCHEDULE = {"r": 8, "target_r": 2, "start_step": 2, "prune_every": 5, "prune_count": 2}


class Logits(Callback):
    """The logits of what was loaded, before any step; training ends there."""

    found: torch.Tensor

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        module.model.eval()
        batch = random_batch(7)
        output = module.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        self.found = output.logits.clone()
        module.model.train()
        trainer.should_stop = True


def save(name: str, rank: int, folder: Path) -> None:
    path = folder / f"{name}.ckpt"
    engine_worker.fit(name, PrunedLoRA(**SCHEDULE), folder, save_at=SAVED_AFTER, path=path)


def load(name: str, path: Path, folder: Path) -> torch.Tensor:
    logits = Logits()
    done = engine_worker.fit(name, PrunedLoRA(**SCHEDULE), folder, resume=path, callbacks=[logits])
    assert done["steps"] == SAVED_AFTER
    assert set(done["ranks"].values()) == {4}
    return logits.found


def save_together(name: str, rank: int, folder: Path) -> None:
    for engine in TOGETHER:
        save(engine, rank, folder)


def load_all(name: str, rank: int, folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    under = ("single",) if name == "single" else TOGETHER
    files = ("single", *TOGETHER)
    return {(one, by): load(by, folder / f"{one}.ckpt", folder) for one in files for by in under}


@pytest.mark.slow
def test_a_checkpoint_of_each_engine_is_the_same_model_under_each_other_and_in_peft(
    tmp_path: Path,
) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    from peft import PeftModel

    engine_worker.launch(save, "single", tmp_path, world=1)
    engine_worker.launch(save_together, "together", tmp_path)
    found = engine_worker.launch(load_all, "single", tmp_path, world=1)
    found += engine_worker.launch(load_all, "together", tmp_path)
    tiny_llama().save_pretrained(tmp_path / "base")
    adapter = {"class_path": "PrunedLoRA", "init_args": SCHEDULE}
    arguments = {"model_name_or_path": str(tmp_path / "base"), "adapter": adapter}
    model = {"class_path": "lightning_peft.modules.CausalLMModule", "init_args": arguments}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    batch = random_batch(7)
    for name in ("single", *TOGETHER):
        expected = found[0][name, "single"]
        for process in found:
            for (saved, engine), logits in process.items():
                if saved == name:
                    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6, msg=engine)
        words = {"ckpt_path": f"{name}.ckpt", "config": "config.yaml", "output": f"{name}-peft"}
        export.main([w for k, v in words.items() for w in (f"--{k}", str(tmp_path / v))])
        peft = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / f"{name}-peft")).eval()
        with torch.no_grad():
            logits = peft(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        with peft.disable_adapter(), torch.no_grad():
            bare = peft(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert (bare - expected).abs().max() > 1e-2
