"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with a run's folder around it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

import lightning_peft.datamodules
import lightning_peft.modules
import lightning_peft.strategies  # noqa: F401 - so that short class names resolve
from lightning_peft.callbacks import LayerImportance, RunRecord
from lightning_peft.commands.parser import FriendlyParser
from lightning_peft.runs import AtomicCheckpointIO, RunLogger, find_last, folder_of, next_folder


class Checkpoints(ModelCheckpoint):
    """Lightning's checkpoints with defaults for adapters: the last two, by step, in the run's folder.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints.
        save_top_k: How many of the latest are kept; -1 keeps all. Two, so that a damaged file leaves one.
    """

    def __init__(self, every_n_train_steps: int = 200, save_top_k: int = 2) -> None:
        super().__init__(
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=save_top_k,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=False,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the end of training, whatever step it falls on."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of a fit; a test there leaves it alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write, if this is a fit."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class PeftCLI(LightningCLI):
    """LightningCLI whose runs have a folder, and go on in it when they are resumed."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every run has beside model, data and trainer."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(LayerImportance, "importance")
        parser.add_lightning_class_args(RunRecord, "record")
        parser.add_argument(
            "--validate_first",
            type=bool,
            default=False,
            help="Validate before the first training step too, for a score to compare with.",
        )
        parser.set_defaults({"model": {"class_path": "lightning_peft.modules.CausalLMModule"}})

    def before_instantiate_classes(self) -> None:
        """Find the run's folder and the checkpoint before anything is loaded."""
        config = self.config[self.subcommand]
        root = config.trainer.default_root_dir or "runs"
        self.ckpt_path: Path | None = None
        if config.get("ckpt_path") == "last":
            self.ckpt_path = find_last(root)
        elif config.get("ckpt_path"):
            self.ckpt_path = Path(config.ckpt_path)
            if not self.ckpt_path.is_file():
                raise FileNotFoundError(f"ckpt_path: {self.ckpt_path} does not exist.")
        self.folder = folder_of(self.ckpt_path) if self.ckpt_path else next_folder(root)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make a trainer that logs into the run's folder and writes its checkpoints there, whole."""
        given = self._get(self.config_init, "trainer")
        own = RunLogger(self.folder)
        others = given.logger if isinstance(given.logger, list) else [given.logger]
        loggers = [own, *(logger for logger in others if logger not in (None, True, False))]
        plugins = given.plugins if isinstance(given.plugins, list) else [given.plugins]
        plugins = [AtomicCheckpointIO(), *(plugin for plugin in plugins if plugin is not None)]
        trainer = super().instantiate_trainer(logger=loggers, plugins=plugins, **kwargs)
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoints):
                callback.dirpath = os.fspath(self.folder / "checkpoints")
        # Set here and not given to fit(), so that the module knows of it when it builds the model.
        trainer.ckpt_path = self.ckpt_path
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs.pop("ckpt_path", None)
        return kwargs

    def before_fit(self) -> None:
        """Score the model as it is, if that is asked for and the run is new."""
        rank_zero_info(f"run folder: {self.folder}")
        if self.ckpt_path is not None or not self._get(self.config, "validate_first"):
            return
        self.trainer.validate(self.model, self.datamodule, verbose=False)
        self.before = {k: float(v) for k, v in self.trainer.callback_metrics.items()}

    def after_fit(self) -> None:
        """Say what came out and where it is."""
        metrics = {k: float(v) for k, v in self.trainer.callback_metrics.items()}
        before = getattr(self, "before", {})
        for key in ("val_loss", "val_accuracy"):
            if key in metrics:
                start = f"{before[key]:.4f} before, " if key in before else ""
                rank_zero_info(f"{key}: {start}{metrics[key]:.4f} after")
        for name in ("adapter", "importance.png", "run.json"):
            if (self.folder / name).exists():
                rank_zero_info(f"{name}: {self.folder / name}")


def main(words: list[str]) -> None:
    """Parse the words of one command and run it.

    Args:
        words: The command and its options.
    """
    import sys

    sys.argv = [sys.argv[0], *words]
    PeftCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=FriendlyParser,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        trainer_defaults={"default_root_dir": "runs", "enable_model_summary": False},
    )
