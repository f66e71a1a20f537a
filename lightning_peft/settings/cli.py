"""LightningCLI with a run's folder around it: the settings of a run, and what is made of them."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_peft.datamodules
import lightning_peft.modules
import lightning_peft.strategies  # noqa: F401 - so that short class names resolve
from lightning_peft import engines
from lightning_peft.callbacks import Checkpoints, LayerImportance, RunRecord
from lightning_peft.errors import MissingFile, UserError
from lightning_peft.runs import (
    AtomicCheckpointIO,
    RunLogger,
    belongs_to_run,
    find_last,
    find_restart,
    folder_of,
    interrupted_test,
    next_folder,
    read_checkpoint,
)
from lightning_peft.settings.keys import refusals_by_class, refusals_of, sentence
from lightning_peft.settings.parser import FriendlyParser
from lightning_peft.settings.quiet import quieten


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of a fit; a test there leaves it alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Only make the folder, so that no other run takes it.

        A start that fails later on must not change the configuration of the run it would resume.
        """
        folder = trainer.log_dir  # a broadcast: on every process
        if stage == "fit" and trainer.is_global_zero and folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what a new run like this one takes: everything but where this one went on from."""
        self.config = self.config.clone()
        self.config["ckpt_path"] = None
        super().setup(trainer, pl_module, "fit")


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

    def _parse_ckpt_path(self) -> None:
        """Take nothing from the checkpoint, whose file Lightning would read here for arguments."""

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
                raise MissingFile(f"ckpt_path: {self.ckpt_path} does not exist.")
            # Says that it is damaged before a large model is loaded.
            read_checkpoint(self.ckpt_path)
        if self.subcommand == "fit":
            self.ckpt_path = find_restart(root, self.ckpt_path)
        own = self.ckpt_path is not None and (
            self.subcommand == "fit" or belongs_to_run(self.ckpt_path)
        )
        if own and self.ckpt_path is not None:
            self.folder = folder_of(self.ckpt_path)
        else:
            asks = self.subcommand in ("test", "predict")
            self.folder = (interrupted_test(root) if asks else None) or next_folder(root)

    def _add_instantiators(self) -> None:
        """Name the keys of classes; Lightning adds what it wants of modules on top."""
        assert isinstance(self.parser, FriendlyParser)
        self.parser.name_keys()
        super()._add_instantiators()

    def instantiate_classes(self) -> None:
        """Make everything, and let through what a constructor itself says of its arguments."""
        with refusals_by_class():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        new = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            begun = subcommand != "fit" or self.trainer.global_step > 0
            if not begun and self.trainer.is_global_zero:
                _remove(new)
            lost = engines.explain(error)
            if lost is not None:
                raise UserError(lost) from error
            if _is_about_trainer(error):
                raise UserError(sentence(error, "trainer")) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make a trainer that logs and writes whole checkpoints into the run's folder."""
        given = self._get(self.config_init, "trainer")
        own = RunLogger(self.folder)
        others = given.logger if isinstance(given.logger, list) else [given.logger]
        loggers = [own, *(logger for logger in others if logger not in (None, True, False))]
        plugins = given.plugins if isinstance(given.plugins, list) else [given.plugins]
        plugins = [AtomicCheckpointIO(), *(plugin for plugin in plugins if plugin is not None)]
        with refusals_of("trainer"):
            trainer = super().instantiate_trainer(logger=loggers, plugins=plugins, **kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.dirpath = os.fspath(self.folder / "checkpoints")
        # Set here and not given to fit(), so that the module knows of it when it builds the model.
        trainer.ckpt_path = self.ckpt_path
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs.pop("ckpt_path", None)
        if subcommand == "test":
            # Lightning's table has a column for each of eight loaders; the module says it in lines.
            kwargs["verbose"] = False
        return kwargs

    def before_fit(self) -> None:
        """Score the model as it is, if that is asked for and the run is new."""
        rank_zero_info(f"run folder: {self.folder}")
        if self.ckpt_path is not None or not self._get(self.config, "validate_first"):
            return
        if engines.traits(self.trainer.strategy).cuts_when_building:
            raise UserError(
                "validate_first: DeepSpeed ZeRO-3 wraps a model once and not again for fit; give "
                "--validate_first false, and score the base by lightning-peft validate."
            )
        self.trainer.validate(self.model, self.datamodule, verbose=False)
        self.before = {k: float(v) for k, v in self.trainer.callback_metrics.items()}
        # Fit adds the module's callbacks again, and warns of those that are there already.
        own = getattr(self.model, "adapter", None)
        self.trainer.callbacks = [c for c in self.trainer.callbacks if c is not own]  # type: ignore[attr-defined]

    def after_fit(self) -> None:
        """Say what came out and where it is."""
        metrics = {k: float(v) for k, v in self.trainer.callback_metrics.items()}
        before = getattr(self, "before", {})
        for key in (key for key in metrics if key.startswith("val_")):
            start = f"{before[key]:.4f} before, " if key in before else ""
            rank_zero_info(f"{key}: {start}{metrics[key]:.4f} after")
        for name in ("adapter", "model", "importance.png", "run.json"):
            if (self.folder / name).exists():
                rank_zero_info(f"{name}: {self.folder / name}")


def _remove(new: list[Path]) -> None:
    """Remove the folders that a start made which came to nothing: the run's, and those above it."""
    for path in new:
        if path == new[0] and not any(path.glob("checkpoints/*")):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _is_about_trainer(error: BaseException) -> bool:
    """Whether an error of a run is Lightning's about the trainer's arguments.

    Some can be wrong for the data only, like ``val_check_interval``; Lightning then raises a plain
    ``ValueError`` that names the argument.
    """
    if isinstance(error, MisconfigurationException):
        return True
    # Of two words: a single one, like `devices`, stands in errors of others too.
    named = re.findall(r"`(\w+_\w+)`", str(error))
    plain = isinstance(error, ValueError) and not isinstance(error, UserError)
    return plain and not inspect.signature(Trainer).parameters.keys().isdisjoint(named)


def make_cli(words: list[str], cli: type[PeftCLI] | None = None) -> PeftCLI:
    """Parse the words of one command, and do what the class makes of it.

    Args:
        words: The command and its options.
        cli: The class; the one that runs the command when None.
    """
    sys.argv = [sys.argv[0], *words]
    quieten()
    return (cli or PeftCLI)(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=FriendlyParser,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        trainer_defaults={
            "default_root_dir": "runs",
            "enable_model_summary": False,
            # The loaders share data out among processes themselves, so that they can be resumed.
            "use_distributed_sampler": False,
        },
    )
