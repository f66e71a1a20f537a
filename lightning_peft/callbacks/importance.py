"""Watching how much each adapted layer changes its output, and at what rank, during training.

Importance of layer i is ``g_i = mean ‖ΔW_i x‖²`` over the attended tokens of a training batch, ΔW
in eval form (no dropout, no mask) and against the original weight; its share is ``g_i / Σ g`` over
the layers of its kind (LoRA-drop, https://arxiv.org/abs/2402.07721, over a sample there, over one
batch here). Methods that train the weights themselves have ‖ΔW_i‖_F instead, which the column
``measure`` tells apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.atomic import write_text
from lightning_peft.callbacks.importance_file import append_rows, begin_file, importance_rows
from lightning_peft.callbacks.measurement import LayerWatch, seen_by_all, weight_changes
from lightning_peft.callbacks.of_trainer import strategy_of
from lightning_peft.errors import UserError
from lightning_peft.reports.records import DECISIONS, csv_text
from lightning_peft.runs import run_folder


class LayerImportance(Callback):
    """Write each layer's mean ‖ΔWx‖², its share within its kind, and its rank.

    Every ``every_n_steps`` optimizer steps the training forward of the step's first micro-batch is
    watched; there is no second forward, and nothing is hooked in between. Into the run's folder go
    ``importance.csv`` (row by row), and at the end of the fit ``decisions.csv`` (what the strategy
    removed or shared, and when) and ``importance.png``. Shares also go to the trainer's loggers,
    except to those that write ``metrics.csv``. Each process measures its own batch, the sums are
    over all of them, and the first process writes.

    Args:
        every_n_steps: Optimizer steps between measurements, at least 1; step 0 is measured.

    Raises:
        UserError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise UserError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._folder: Path | None = None
        self._measures = False
        self._watch: LayerWatch | None = None  # of the batch that is being watched
        self._last_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file, or go on in that of the interrupted run."""
        folder = run_folder(trainer)  # on every process, since it is a broadcast
        if folder is None:
            return
        self._last_step, self._measures = -1, True
        if trainer.is_global_zero:
            self._folder = folder
            begin_file(folder / "importance.csv", trainer.global_step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch this batch if it opens the window of a step that is due."""
        step = trainer.global_step
        if not self._measures or step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        self._watch = LayerWatch(_adapted_model(trainer, pl_module))
        self._watch.start()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """The forward pass is over: record it, before anything is recomputed or removed."""
        self._record(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a batch that had no backward pass (a step that returned None)."""
        self._record(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the decisions and draw the picture; also of a run killed after its last step."""
        # A broadcast: on every process, also where the first has its folder already.
        folder = run_folder(trainer)
        if self._folder is None and folder is not None:
            written, drawn = folder / "importance.csv", folder / "importance.png"
            undrawn = written.is_file() and not drawn.is_file()
            self._folder = folder if undrawn and trainer.is_global_zero else None
        self._close(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave a picture of what was seen until then."""
        self._stop_watching()
        self._close(trainer)

    def _stop_watching(self) -> LayerWatch | None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()
        return watch

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        watch = self._stop_watching()
        if watch is None:
            return
        if adapter_layers(watch.model):
            seen, measure = seen_by_all(watch.model, watch.seen), "output"
        else:
            seen, measure = weight_changes(strategy_of(trainer)), "weight"
        if self._folder is None:
            return
        if not seen:
            _say_why_nothing_was_seen(watch.model, self._last_step)
            return
        rows = importance_rows(self._last_step, seen, measure)
        append_rows(self._folder / "importance.csv", rows)
        shares = {f"importance/{row['layer']}": row["share"] for row in rows}
        for logger in trainer.loggers:
            # Hundreds of columns, most cells empty, would make metrics.csv unreadable.
            if not isinstance(logger, CSVLogger):
                logger.log_metrics(shares, step=self._last_step)

    def _close(self, trainer: Trainer) -> None:
        folder, self._folder, self._measures = self._folder, None, False
        if folder is None:
            return
        strategy = strategy_of(trainer)
        try:
            decisions = [] if strategy is None else strategy.decisions
            text = ",".join(DECISIONS) + "\n" + csv_text(decisions, DECISIONS)
            write_text(folder / "decisions.csv", text)
            if (folder / "importance.csv").read_bytes().count(b"\n") > 1:  # rows, not only names
                self.draw(folder, title="" if strategy is None else type(strategy).__name__)
        except Exception as error:  # a picture that fails must not take a trained adapter with it
            rank_zero_warn(f"importance.png was not drawn: {error}")

    def draw(self, folder: Path, title: str) -> None:
        """Draw the picture of a run's folder."""
        from lightning_peft.reports.pictures import save_importance

        save_importance(folder, title=title)


def _adapted_model(trainer: Trainer, pl_module: LightningModule) -> nn.Module:
    """The module whose forward runs the adapted layers, and in which decisions name them."""
    strategy = strategy_of(trainer)
    for model in (strategy.model if strategy else None, getattr(pl_module, "model", None)):
        if isinstance(model, nn.Module) and adapter_layers(model):
            return model
    return pl_module


def _say_why_nothing_was_seen(model: nn.Module, step: int) -> None:
    if adapter_layers(model):
        rank_zero_warn(
            f"LayerImportance saw no adapted layer at step {step}: training_step must call the "
            f"adapted {type(model).__name__} itself, as model(...), not its parts."
        )
    else:
        rank_zero_info("LayerImportance has nothing to watch: the model has no adapted layers.")
