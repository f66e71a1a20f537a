"""A short Lightning run and its resume: what a strategy meets outside of a plain loop."""

from __future__ import annotations

import functools
import logging
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft.adapters import adapter_state_dict
from lightning_peft.callbacks import LayerImportance, RunRecord
from lightning_peft.modules import CausalLMModule
from lightning_peft.testing.loop import CPU, LEARNING_RATE, STEPS, Make
from lightning_peft.testing.model import Batch, random_batch, tiny_llama

SAVED = 8  # steps; the end of the second of three epochs


class _Module(CausalLMModule):
    """The module of every run, over the small random LLaMA."""

    def load_base(self) -> Any:
        return tiny_llama()


class _Importance(LayerImportance):
    """Measures every layer; its picture would take longer than the run."""

    def draw(self, folder: Path, title: str) -> None:
        pass


class _Batches(LightningDataModule):
    """Four batches, in the same order in each epoch."""

    def train_dataloader(self) -> DataLoader[Batch]:
        batches: Any = [random_batch(seed) for seed in range(4)]
        # With a generator of its own, or each epoch would begin with a number of torch's stream.
        return DataLoader(batches, batch_size=None, generator=torch.Generator())

    def probe_dataloader(self, ratio: float) -> list[Batch]:
        return [random_batch(1000 + i) for i in range(2)]


def check_fit(make: Make, device: torch.device = CPU) -> None:
    """Fit twelve steps, and once more from the checkpoint after eight; both end with equal bits.

    Args:
        make: Makes the strategy.
        device: Where it trains.

    Raises:
        AssertionError: If a run fails, or the two ends differ.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        fit = functools.partial(_fit, make, device)
        whole = fit(Path(folder) / "whole")
        resumed = fit(Path(folder) / "resumed", Path(folder) / f"whole/step={SAVED}.ckpt")
    name = type(whole.adapter).__name__
    expected, found = _trained(whole.model), _trained(resumed.model)
    for key in sorted(expected.keys() | found.keys()):
        if key not in found or key not in expected or not torch.equal(found[key], expected[key]):
            raise AssertionError(
                f"{name}: a Lightning run resumed from a checkpoint ends with another {key} than "
                "one that was never stopped; what steps or gates remember must be in state_dict "
                "or a buffer."
            )
    if whole.adapter.decisions != resumed.adapter.decisions:
        raise AssertionError(f"{name}: a resumed Lightning run remembers other decisions.")


def _fit(
    make: Make, device: torch.device, folder: Path, checkpoint: Path | None = None
) -> CausalLMModule:
    strategy = make()
    torch.manual_seed(5)
    optimizer = functools.partial(torch.optim.AdamW, lr=LEARNING_RATE)
    module = _Module("tiny_llama", adapter=strategy, optimizer=optimizer)
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1 if device.index is None else [device.index],
        max_steps=STEPS,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_Importance(every_n_steps=4), RunRecord(), saves],
    )
    # Also known before fit, so that the structure comes from the checkpoint.
    trainer.ckpt_path = checkpoint
    try:
        trainer.fit(module, datamodule=_Batches(), ckpt_path=checkpoint)
    except Exception as error:
        what = "a Lightning run" if checkpoint is None else "a resumed Lightning run"
        raise AssertionError(
            f"{type(strategy).__name__}: {what} fails with {type(error).__name__}: {error}"
        ) from error
    return module


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    own = dict(adapter_state_dict(model))
    return own | {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither messages nor warnings, and Python's random numbers as they were."""
    state, logger = random.getstate(), logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        random.setstate(state)
