"""LightningCLI with a run's folder around it: the settings of a run, and what is made of them."""

from __future__ import annotations

import inspect
import os
import re
import sys
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_peft.datamodules
import lightning_peft.modules
import lightning_peft.strategies  # noqa: F401 - so that short class names resolve
from lightning_peft import engines
from lightning_peft.atomic import write_text
from lightning_peft.callbacks import Checkpoints, LayerImportance, RunRecord
from lightning_peft.errors import UserError
from lightning_peft.runs import (
    AtomicCheckpointIO,
    RunLogger,
    find_place,
    run_folder,
)
from lightning_peft.settings.keys import refusals_by_class, refusals_of, sentence
from lightning_peft.settings.parser import FriendlyParser, older_names
from lightning_peft.settings.quiet import quieten
from lightning_peft.settings.resume import (
    ApplyChanges,
    Change,
    check_changes,
    differences,
    is_recorded,
)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of a fit, and the settings into its checkpoints."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a start that fails must not change the configuration of its run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what a new run like this one takes: everything but where this one went on from."""
        self.config = self.config.clone()
        self.config["ckpt_path"], self.config["resume_with_changes"] = None, False
        folder = run_folder(trainer)  # a broadcast: on every process
        if trainer.is_global_zero and folder is not None:
            write_text(folder / "config.yaml", dumped(self.parser, self.config))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the settings, which a resume is compared with."""
        checkpoint["settings"] = plain(self.parser, self.config)


def dumped(parser: LightningArgumentParser, config: Namespace) -> str:
    """A command's whole configuration as YAML, as SaveConfigCallback writes it."""
    with older_names():
        return parser.dump(config, skip_none=False)  # type: ignore[no-any-return]


def plain(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """The same as a tree of plain values."""
    return yaml.safe_load(dumped(parser, config))  # type: ignore[no-any-return]


class PeftCLI(LightningCLI):
    """LightningCLI whose runs have a folder, and go on in it when they are resumed."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The command that is given, if it is one: each takes a while to make a parser for."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in sys.argv[1:2] if name in every} or every

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
        parser.add_argument(
            "--resume_with_changes",
            type=bool,
            default=False,
            help="Go on from a checkpoint with other settings than it was trained with.",
        )
        parser.set_defaults({"model": {"class_path": "lightning_peft.modules.CausalLMModule"}})

    def _parse_ckpt_path(self) -> None:
        """Take nothing from the checkpoint, whose file Lightning would read here for arguments."""

    def before_instantiate_classes(self) -> None:
        """Find the run's folder and the checkpoint before anything is loaded."""
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        root, trial = config.trainer.default_root_dir or "runs", bool(config.trainer.fast_dev_run)
        self.place = find_place(self.subcommand, root, config.get("ckpt_path"), trial)
        self.changes: list[Change] = []
        if self.subcommand == "fit" and self.place.settings is not None:
            try:
                given = plain(self._parser("fit"), config)
                changes = list(differences(self.place.settings, given))
                check_changes(changes, bool(config.resume_with_changes))
            except BaseException:
                self.place.give_up()
                raise
            self.changes = [change for change in changes if is_recorded(change)]

    def _add_instantiators(self) -> None:
        """Name the keys of classes; Lightning adds what it wants of modules on top."""
        assert isinstance(self.parser, FriendlyParser)
        self.parser.name_keys()
        super()._add_instantiators()

    def instantiate_classes(self) -> None:
        """Make everything, and let through what a constructor itself says of its arguments."""
        try:
            with refusals_by_class():
                super().instantiate_classes()
        except BaseException:
            self.place.give_up()
            raise

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            answers = (self.place.folder / "predictions").exists()
            if not (self.trainer.global_step if subcommand == "fit" else answers):
                self.place.give_up()
            lost = engines.explain(error)
            if lost is not None:
                raise UserError(lost) from error
            if _is_about_trainer(error):
                raise UserError(sentence(error, "trainer")) from error
            raise
        finally:
            self.place.release()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make a trainer that logs and writes whole checkpoints into the run's folder."""
        given = self._get(self.config_init, "trainer")
        own = [RunLogger(self.place.folder)] if self.subcommand != "validate" else []
        others = given.logger if isinstance(given.logger, list) else [given.logger]
        loggers = [*own, *(logger for logger in others if logger not in (None, True, False))]
        plugins = given.plugins if isinstance(given.plugins, list) else [given.plugins]
        plugins = [AtomicCheckpointIO(), *(plugin for plugin in plugins if plugin is not None)]
        with refusals_of("trainer"):
            trainer = super().instantiate_trainer(
                logger=loggers or False, plugins=plugins, **kwargs
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.dirpath = os.fspath(self.place.folder / "checkpoints")
            elif isinstance(callback, RunRecord):
                callback.new_changes = self.changes
        if self.changes:
            trainer.callbacks.append(ApplyChanges(self.changes))  # type: ignore[attr-defined]
        # Set here and not given to fit(), so that the module knows of it when it builds the model.
        trainer.ckpt_path = self.place.checkpoint
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
        trial = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        folder = "none, since fast_dev_run keeps nothing" if trial else self.place.folder
        rank_zero_info(f"run folder: {folder}")
        if self.place.checkpoint is not None or not self._get(self.config, "validate_first"):
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
            path = self.place.folder / name
            if path.exists() and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                rank_zero_info(f"{name}: {path}")


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
        seed_everything_default=0,
        auto_configure_optimizers=False,
        trainer_defaults={
            "default_root_dir": "runs",
            "enable_model_summary": False,
            # The loaders share data out among processes themselves, so that they can be resumed.
            "use_distributed_sampler": False,
        },
    )
