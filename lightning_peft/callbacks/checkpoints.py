"""When checkpoints are written: by step, at the end, and when the machine is taken away."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_peft import distributed
from lightning_peft.errors import UserError
from lightning_peft.runs import step_of


class Preempted(SystemExit):
    """Raised after the checkpoint that SIGTERM or SIGUSR1 asked for; ends the process.

    Args:
        number: The signal.
        step: Optimizer steps that were made.
        first: Whether this is the first process, whose exit status is 128 + number; the others end
            with 0, since a launcher would kill the first if they failed before it.
    """

    def __init__(self, number: int, step: int, first: bool) -> None:
        super().__init__(128 + number if first else 0)
        self.name, self.step = signal.Signals(number).name, step
        rank_zero_info(f"{self.name}: saved after {step} steps; go on with --ckpt_path last")

    def __str__(self) -> str:
        """What the run's record says."""
        return f"{self.name} after {self.step} steps"


class Checkpoints(ModelCheckpoint):
    """Lightning's checkpoints with defaults for adapters: the last two, by step.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints.
        save_top_k: How many of the latest are kept; -1 keeps all. Two, so that a damaged file
            leaves one.
        exact_resume: Refuse a checkpoint of another number of processes, from which a run goes on
            with equal decisions but other masks and rounding.
    """

    def __init__(
        self, every_n_train_steps: int = 200, save_top_k: int = 2, exact_resume: bool = False
    ) -> None:
        super().__init__(
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=save_top_k,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=False,
        )
        self.exact_resume = exact_resume
        self._after_validation = False
        self._received = 0  # the signal that this process has got, at any moment
        self._agreed = 0  # the one that all of them act on, after the same step
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning's handler of SIGTERM away.

        It broadcasts from within, in the middle of whatever the processes send each other then.
        Before training there is nothing to save, so that the signal just ends the process, and the
        others with it.
        """
        super().setup(trainer, pl_module, stage)
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint that a run cannot go on from exactly, if that was asked for."""
        saved, present = len(checkpoint.get("random_state", [])), trainer.world_size
        if self.exact_resume and saved != present:
            raise UserError(
                f"checkpoint.exact_resume: the checkpoint is of {saved} processes, this run has "
                f"{present}; give as many devices, or exact_resume: false to go on with equal "
                "decisions, other masks and other rounding."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what lies after the checkpoint that the run goes on from, and torn files."""
        folder = Path(self.dirpath or "")
        if trainer.is_global_zero and self.dirpath and folder.is_dir():
            later = [p for p in folder.glob("step=*.ckpt") if step_of(p) > trainer.global_step]
            for path in (*later, *folder.glob(".*.part")):
                path.unlink()
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._handlers.setdefault(number, signal.signal(number, self._remember))

    def _remember(self, number: int, frame: Any) -> None:
        # Only remembered. It may come while the processes save together: a process that acted on it
        # alone would leave the others in the middle of the next step.
        self._received = number

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Remember how many steps were made before this batch."""
        self._steps_before = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save right after an optimizer step that is due.

        Lightning's own hook puts the save off at the last batch of an epoch, to the first batch of
        the next one: in the middle of an accumulation window, whose gradients no checkpoint holds.
        """
        step = trainer.global_step
        if step == self._steps_before:
            return
        # Whichever process was told to end, all of them save and end, after the same step.
        self._agreed = distributed.largest(self._received)
        if step % self._every_n_train_steps and not self._agreed:
            return
        # A run that goes on from before a validation does not make up for it, and would lack its
        # row in metrics.csv: where one follows, the checkpoint comes after it.
        fit = trainer.fit_loop
        self._after_validation = fit.epoch_loop._should_check_val_fx(fit._data_fetcher)  # type: ignore[arg-type]
        if not self._after_validation:
            self._save(trainer)
            self._end_if_agreed(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was put off until here."""
        if self._after_validation:
            self._after_validation = False
            self._save(trainer)
            self._end_if_agreed(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the end of training, whatever step it falls on.

        A signal that came after the last step changes nothing: the run is about to end.
        """
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _end_if_agreed(self, trainer: Trainer) -> None:
        if self._agreed:
            raise Preempted(self._agreed, trainer.global_step, trainer.is_global_zero)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End together if that was agreed, else end the processes that this one has started.

        Those would wait for it for ever.
        """
        super().on_exception(trainer, pl_module, exception)
        launcher: Any = trainer.strategy.launcher
        if isinstance(exception, Preempted):
            distributed.leave()
        elif getattr(launcher, "procs", ()):
            launcher.kill(signal.SIGKILL)
            # Lightning's observer of them kills this process too, before it can say why it ends.
            launcher.procs.clear()
        self._give_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _nothing() -> None:
    """What takes the place of Lightning's registration."""
